"""An option is declared once: signature, ``help()``, flags and the types for checkers all come from its field."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

import fct
from fct.backfilling.single import transform_file
from fct.cli.app import app
from fct.cli.flags import flags
from fct.gallery import export_bulk
from fct.options import groups, keywords
from fct.options.declare import Flag, Group, OptionSet, flat, option, optional, takes
from fct.options.groups import (
    BackfillOptions,
    ExportOptions,
    PlanOptions,
    StoreAccess,
    TransformFileOptions,
    VerifyOptions,
)
from fct.options.option_checks import whole
from tools import option_keywords

FUNCTIONS: dict[str, tuple[Callable[..., Any], type[OptionSet]]] = {
    "plan": (fct.plan_backfill, PlanOptions),
    "backfill": (fct.backfill, BackfillOptions),
    "verify": (fct.verify_gallery, VerifyOptions),
    "transform": (transform_file, TransformFileOptions),
    "export": (export_bulk, ExportOptions),
}
COMMANDS: Any = typer.main.get_group(app).commands
BAD: dict[str, Any] = {
    "retries": -1,
    "timeout": 0,
    "scale": 0,
    "shard_rows": 0,
    "dtype": "int8",
    "follow": 2,
    "format": 1,
}


def test_the_keywords_for_type_checkers_are_todays() -> None:
    assert option_keywords.PATH.read_text() == option_keywords.rendered(), "run python -m tools.option_keywords"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature_help_keywords_and_flags_agree(name: str) -> None:
    function, options = FUNCTIONS[name]
    shown = inspect.signature(function).parameters
    typed = get_type_hints(getattr(keywords, option_keywords.keywords_name(options)))
    params = {p.name: p for p in COMMANDS[name].params}
    assert {known.name for known, _ in flat(options)} == set(typed)
    for known, hint in flat(options):
        assert shown[known.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert shown[known.name].default == known.default
        assert f"{known.name} (" in (function.__doc__ or "")
        assert typed[known.name] == hint
        help = known.metadata["help"]
        assert help.endswith((".", "...")), f"{known.name}: {help}"
        if known.metadata["flag"] is False:
            assert known.name not in params
        else:
            assert params[known.name].help == help
            assert params[known.name].default in (known.default, None)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_option_is_checked_by_name(name: str) -> None:
    """Before anything is looked for, so that a typing error costs nothing."""
    function, options = FUNCTIONS[name]
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    for bad in {known.name for known, _ in flat(options)} & set(BAD):
        with pytest.raises((ValueError, TypeError), match=f"^{bad}: expected"):
            function(*["/nowhere"] * len(needed), **{bad: BAD[bad]})
    with pytest.raises(TypeError, match=r"^retires: expected an option .* \(did you mean 'retries'\?\)"):
        options.split({"retires": 1})


def test_a_group_is_frozen_keyword_only_and_picklable() -> None:
    for cls in vars(groups).values():
        if not (inspect.isclass(cls) and issubclass(cls, (Group, OptionSet)) and cls not in (Group, OptionSet)):
            continue
        made = cls()
        assert pickle.loads(pickle.dumps(made)) == made
        first = dataclasses.fields(made)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, first, None)
        with pytest.raises(TypeError, match="positional"):
            cls(None)  # type: ignore[call-arg]  # refused


def test_a_check_keeps_pythons_own_numbers() -> None:
    import numpy as np

    given = BackfillOptions.split(
        {"shard_rows": np.int64(300), "scale": np.float32(2), "keep_side_info": np.bool_(True)}
    )
    assert (type(given.cut.shard_rows), type(given.columns.scale)) == (int, float)
    assert given.output.keep_side_info is True


@dataclass(frozen=True, kw_only=True)
class Brakes(Group):
    """How fast it may go."""

    max_rows_per_s: int | None = option(None, "Rows a second at most.", check=optional(whole(1)))
    mode: Literal["soft", "hard"] = option("soft", "How to brake: soft or hard.")
    careful: bool = option(False, "Look twice.")
    tags: list[str] = option((), "May be repeated.", flag=Flag(name="--tag", type=list[str] | None, parse=tuple))
    hook: object = option(None, "For Python alone.", flag=False)


@dataclass(frozen=True, kw_only=True)
class Driving(OptionSet):
    access: StoreAccess = field(default_factory=StoreAccess)
    brakes: Brakes = field(default_factory=Brakes)


def test_a_new_field_is_all_that_a_new_option_takes() -> None:
    seen: dict[str, Any] = {}

    @takes(Driving)
    def drive(where: str, **options: Any) -> Driving:
        """Drives."""
        return Driving.split(options)

    @flags(Driving)
    def command(where: str, **options: Any) -> None:
        """Drive there."""
        seen.update(options=options, given=drive(where, **options))

    assert "max_rows_per_s (int | None, None): Rows a second at most." in (drive.__doc__ or "")
    assert drive("x", max_rows_per_s=5).brakes.max_rows_per_s == 5
    with pytest.raises(ValueError, match="max_rows_per_s: expected a whole number of at least 1, got 0"):
        drive("x", max_rows_per_s=0)
    small = typer.Typer()
    small.command()(command)
    words = ["x", "--max-rows-per-s", "7", "--careful", "--mode", "hard", "--tag", "a", "--tag", "b", "--retries", "2"]
    assert CliRunner().invoke(small, words).exit_code == 0
    assert seen["given"].brakes == Brakes(max_rows_per_s=7, mode="hard", careful=True, tags=("a", "b"))  # type: ignore[arg-type]  # as parse= makes it
    assert seen["given"].access.retries == 2
    assert "hook" not in seen["options"]
    failed = CliRunner().invoke(small, ["x", "--mode", "gentle"])
    assert str(failed.exception) == "mode: expected one of soft, hard, got 'gentle'"
    shown = CliRunner().invoke(small, ["--help"], env={"COLUMNS": "200"}).output
    assert "Brakes" in shown
    assert "Rows a second at most." in shown
    assert "--no-careful" not in shown
