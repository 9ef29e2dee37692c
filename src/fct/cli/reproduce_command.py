"""``fct reproduce``: a whole experiment from one YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fct.cli.console import console


def reproduce(
    experiment: Annotated[
        str | None, typer.Argument(help="A YAML file, or the name of one that comes with fct.", show_default=False)
    ] = None,
    data_root: Annotated[
        Path | None,
        typer.Option(
            help="The data set's folder, as its publisher lays it out; Fashion-MNIST without: the subset inside fct."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the stages' output.")] = Path("fct-reproduce"),
    epochs_override: Annotated[int | None, typer.Option(help="So many epochs everywhere: a rehearsal.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Processes that read image files.")] = 4,
    list_names: Annotated[bool, typer.Option("--list", help="Name the experiments that come with fct.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Redo stages whose settings or data changed.")] = False,
) -> None:
    """Run an experiment of the paper, stage by stage: old, side-info, new, bct, h, evaluation.

    A stage whose output is there is skipped; an interrupted one goes on from its checkpoint.

    Example: fct reproduce fashion-mnist-5-to-10 --data-root /usr/share/datasets/fashion-mnist
    """
    from fct.life.experiment import experiment_names, load_experiment

    if list_names:
        for name in experiment_names():
            console.print(name, highlight=False)
        return
    if experiment is None:
        raise typer.BadParameter(f"expected a YAML file or one of {', '.join(experiment_names())}, got none")
    from fct.life.reproduce import run_experiment

    plan = load_experiment(experiment)
    if epochs_override is not None:
        plan = plan.with_epochs(epochs_override)
    table = run_experiment(plan, data_root, out, overwrite=overwrite, device=device, workers=workers, console=console)
    console.print(table.to_rich())
    console.print(f"table: {out / plan.name / 'evaluation' / 'table.md'}", highlight=False)
