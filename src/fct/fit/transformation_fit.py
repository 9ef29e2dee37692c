"""Fitting h on pairs of (old embedding, side-information, new embedding)."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fct.artifact.transformation import Tolerance, Transformation
from fct.checks import check_flag, check_number, check_path, check_positive, check_seed
from fct.errors import FctWarning
from fct.fit.auto_fit import AutoFit, climb, judge
from fct.fit.auto_plan import plan_fit
from fct.fit.distil import distil
from fct.fit.linear_artifact import blend_linear, linear_transformation
from fct.fit.linear_map import LinearMap
from fct.fit.mixed_length import calibrate_length
from fct.fit.module import to_transformation
from fct.fit.neighbours import NeighbourTest
from fct.fit.pair_training import EpochReport, PairTraining, scalings_of
from fct.fit.pairs import Pairs, check_pairs, split_pairs
from fct.fit.recipes import FitConfig, resolve_config
from fct.fit.repeated_pairs import find_repeated
from fct.fit.shared_pairs import require_apart
from fct.fit.training_device import training_device
from fct.progress import step_bar
from fct.spaces import EmbeddingSpace, check_space
from fct.types import Floats, JsonDict, RowsLike

if TYPE_CHECKING:
    from rich.progress import TaskID


__all__ = ["EpochReport", "fit_transformation"]

_LOG = logging.getLogger("fct.fit")
_NORM_SAMPLE = 20_000  # rows that are looked at for a common length
_MEASURED_PAIRS = 4_096  # validation rows that the precisions and the length are measured on


def fit_transformation(
    old: RowsLike,
    side_info: RowsLike | None,
    new: RowsLike,
    *,
    validation: float | tuple[RowsLike, RowsLike | None, RowsLike] | None = None,
    config: str | FitConfig = "auto",
    unpaired: tuple[RowsLike, RowsLike | None] | None = None,
    seconds: float | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
    old_space: EmbeddingSpace | None = None,
    new_space: EmbeddingSpace | None = None,
    side_model: str = "side-information",
    tolerance: Tolerance | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 30.0,
    on_epoch: Callable[[EpochReport], None] | None = None,
) -> Transformation:
    """Learns h with ``h(old, side_info) ≈ new`` from pairs; no other network runs here.

    Args:
        old, new: (n, d_old) and (n, d_new) embeddings of the same n items by the old and the new model; float32,
            float16, bfloat16 or :class:`fct.ScaledInt8`; numpy (mapped files too: the pairs need not fit in memory),
            torch or DLPack.
        side_info: (n, d_side) side-information of the same items, or None: the old embedding takes its place.
        validation: a share to hold out, or a tuple (old, side_info, new) of its own. None: for "auto" and "best" what
            suits the number of pairs (few are cross-fitted, so that none is lost), else 5 %, at most 20,000 rows.
        config: "auto" (our default, for 100 to 10,000,000 pairs), "best" (several h averaged and distilled into one,
            takes some five times longer), "paper" (Ramanujan et al. to the letter), or a
            :class:`fct.fit.recipes.FitConfig`.
        unpaired: (old, side_info) arrays of gallery rows that have no new embedding, for "best": what the averaged h
            says of them is learnt too. side_info is None where the pairs have none.
        seconds: time to plan for, for "auto" and "best": seconds of two cores with AVX-512; by default 40 and more.
            It is a plan, not a deadline: a slow or busy machine takes longer, and ends with the same h.
        seed: same seed, same data and same machine give the same h.
        device: "auto" (a GPU where torch sees one), "cpu", "cuda", ...
        progress: show a bar on stderr, where that is a terminal or a notebook, and say each choice in a line.
        old_space, new_space: whose vectors these are; by default named "old" and "new", normalised where every row
            given is of unit length. h's output is normalised where the new space is.
        side_model: the id of the model that made side_info.
        tolerance: what ``precision="auto"`` may cost later.
        checkpoint: a file to write the state to every ``checkpoint_seconds`` and to go on from; removed when done.
            "auto" and "best", which train several h, write the later ones' to files beside it, NAME.1, NAME.2, ...
        on_epoch: called after each epoch.

    Returns:
        h. For "auto" and "best" never one that finds less than ridge regression and Procrustes do on the held-out
        pairs: else that map is what is returned, and ``info["choices"]`` says so. For the others the h of the epoch
        with the lowest validation error. ``info`` holds the figures and every choice in a line, and under "mixed" the
        length for mapped rows that will stand among true ones (:func:`fct.evaluate_mixed`); ``precisions`` the
        measured effect of bf16 and int8 on retrieval among the validation pairs.

    Raises:
        TypeError, ValueError: bad arrays or settings. ArtifactError: the checkpoint is damaged or of another fit.

    Warns:
        FctWarning: some inputs stand there with more than one new embedding, or in validation and training pairs both.

    Source: Ramanujan et al., "Forward Compatible Training for Large-Scale Embedding Retrieval Systems", CVPR 2022,
    arXiv:2112.02805.

    Examples:
        >>> import numpy as np, fct
        >>> from fct.fit.recipes import FitConfig
        >>> rng = np.random.default_rng(0)
        >>> old, side = rng.standard_normal((2, 200, 8)).astype(np.float32)
        >>> h = fct.fit_transformation(old, side, np.tanh(old + side), progress=False,
        ...                            config=FitConfig(inner=16, epochs=2, batch_size=64))
        >>> h.d_new
        8
    """
    settings = resolve_config(config)
    check_seed(seed)
    check_flag(progress, "progress")
    check_number(checkpoint_seconds, "checkpoint_seconds", 0)
    if seconds is not None:
        check_positive(seconds, "seconds", "a positive number or None")
    if tolerance is not None and not isinstance(tolerance, Tolerance):
        raise TypeError(f"tolerance: expected a Tolerance or None, got {type(tolerance).__name__}")
    state = None if checkpoint is None else check_path(checkpoint, "checkpoint", "a path or None")
    if on_epoch is not None and not callable(on_epoch):
        raise TypeError(f"on_epoch: expected a function or None, got {type(on_epoch).__name__}")
    if unpaired is not None and config != "best":
        raise ValueError("unpaired: expected None unless config='best', which alone learns from such rows")
    pairs = check_pairs(old, side_info, new)
    extra = None if unpaired is None else _check_unpaired(unpaired, pairs)
    given = _check_validation(validation, pairs)
    _check_space(old_space, pairs.old.d, "old_space")
    _check_space(new_space, pairs.new.d, "new_space")
    target = training_device(device)
    sample = pairs.sample(_NORM_SAMPLE, seed).loaded()
    spaces = old_space or _guess_space("old", sample[0]), new_space or _guess_space("new", sample[2])
    begun = time.monotonic()
    with step_bar(progress) as bar:
        run = _Run(
            pairs, given, None if isinstance(validation, tuple) else validation, seed, target, spaces,
            None if side_info is None else side_model, bar, state, checkpoint_seconds, on_epoch,
        )  # fmt: skip
        if settings is None:
            length = _common_length(sample[2])
            if spaces[1].normalised and (length is None or abs(length - 1) < 1e-2):
                length = 1.0
            h, held = run.auto(length, seconds, extra if config == "best" else None, best=config == "best")
        else:
            h, held = run.single(settings)
    info = {
        "recipe": config if isinstance(config, str) else "custom",
        "seed": seed,
        **h.info,
        "seconds": round(time.monotonic() - begun, 3),
        "device": str(target),
        "torch": torch.__version__,
    }
    h = _measure(h.with_(tolerance=tolerance or Tolerance(), info=info), run.train, held, seed, progress)
    run.forget()
    return h


def _check_validation(validation: object, pairs: Pairs) -> Pairs | None:
    if validation is None or isinstance(validation, float):
        return None
    if not isinstance(validation, tuple) or len(validation) != 3:
        raise ValueError(
            f"validation: expected a share or a tuple (old, side_info, new), got {type(validation).__name__}"
        )
    held = check_pairs(*validation, prefix="validation ")
    if (held.side is None) != (pairs.side is None):
        raise ValueError("validation: expected side_info in both or in neither of training and validation pairs")
    if held.dims != pairs.dims:
        raise ValueError(f"validation: expected dims {pairs.dims} to match the training pairs, got {held.dims}")
    if len(pairs) < 2:
        raise ValueError(f"old: expected at least 2 rows to train on, got {len(pairs)}")
    return require_apart(pairs, held)


def _check_unpaired(unpaired: object, pairs: Pairs) -> tuple[Floats, Floats | None]:
    """(old, side_info) float32; the gallery's rows stand in for a new embedding only to be checked alike."""
    if not isinstance(unpaired, tuple) or len(unpaired) != 2:
        raise ValueError(f"unpaired: expected a tuple (old, side_info), got {type(unpaired).__name__}")
    rows = check_pairs(unpaired[0], unpaired[1], unpaired[0], prefix="unpaired ")
    if (rows.side is None) != (pairs.side is None):
        raise ValueError("unpaired: expected side_info in both or in neither of the pairs and the unpaired rows")
    if rows.dims[:2] != pairs.dims[:2]:
        raise ValueError(f"unpaired: expected dims {pairs.dims[:2]} to match the pairs, got {rows.dims[:2]}")
    return rows.loaded()[:2]


def _check_space(space: EmbeddingSpace | None, d: int, name: str) -> None:
    check_space(space, name)
    if space is not None and space.dim != d:
        raise ValueError(f"{name}: expected dim {d} to match the rows, got {space}")


def _guess_space(model_id: str, rows: Floats) -> EmbeddingSpace:
    unit = bool(np.all(np.abs(np.linalg.norm(rows, axis=1) - 1) < 1e-2))
    return EmbeddingSpace(model_id, int(rows.shape[1]), normalised=unit)


def _common_length(rows: Floats) -> float | None:
    """The one length that all rows have (a unit-length space in other units), or None."""
    norms = np.linalg.norm(rows, axis=1)
    mean = float(norms.mean())
    return mean if mean > 0 and bool(np.all(np.abs(norms - mean) < 1e-2 * mean)) else None


def _measure(h: Transformation, train: Pairs, held: Pairs, seed: int, progress: bool) -> Transformation:
    """Calibrates int8 on training rows and stores how each precision changes retrieval on the held-out ones."""
    from fct.fit.precision_choice import calibrate, measure_precisions

    old, side, _ = train.sample(_MEASURED_PAIRS, seed).loaded()
    h = calibrate(h, old, side)
    old, side, new = held.sample(_MEASURED_PAIRS, seed).loaded()
    return measure_precisions(h, old, side, new, progress=progress)


@dataclass(eq=False)
class _Run:
    """One call: the pairs and settings that all its trainings share."""

    train: Pairs
    given: Pairs | None
    share: float | None
    seed: int
    device: torch.device
    spaces: tuple[EmbeddingSpace, EmbeddingSpace]
    side_model: str | None
    bar: Any
    state: Path | None
    checkpoint_seconds: float
    on_epoch: Callable[[EpochReport], None] | None

    def __post_init__(self) -> None:
        self._task: TaskID | None = None
        self._states: list[Path] = []
        self.choices: list[str] = []

    # ---- telling ----
    def _tell(self, line: str) -> None:
        self.choices.append(line)
        _LOG.info(line)
        if not self.bar.disable:
            self.bar.console.print(line, highlight=False, markup=False)

    def _hear(self, report: EpochReport) -> None:
        if self.on_epoch is not None:
            self.on_epoch(report)
        text = (
            "fitting h" if np.isnan(report.validation_mse) else f"fitting h (held-out mse {report.validation_mse:.3g})"
        )
        self.bar.update(self._task, advance=1, description=text)

    def _state_of(self, number: int) -> Path | None:
        if self.state is None:
            return None
        path = self.state if number == 0 else self.state.with_name(f"{self.state.name}.{number}")
        self._states.append(path)
        return path

    def forget(self) -> None:
        """Removes the checkpoints of what is done."""
        for path in self._states:
            path.unlink(missing_ok=True)

    # ---- one training, by numbers that were given ----
    def single(self, config: FitConfig) -> tuple[Transformation, Pairs]:
        held = self.given
        if held is None:
            self.train, held = split_pairs(self.train, 0.05 if self.share is None else self.share, self.seed)
        self._task = self.bar.add_task("fitting h", total=config.epochs)
        scalings = scalings_of(self.train, config.standardise, self.seed)
        linear = None
        if config.skip == "ridge":
            from fct.fit.linear_map import RidgePath

            linear = RidgePath(self.train, self.seed).at(1e-2)
        training = PairTraining(self.train, held, config, self.seed, self.device, scalings, linear)
        training.run(self._state_of(0), self.checkpoint_seconds, self._hear)
        best = training.best
        info = {
            "config": config.to_dict(),
            "pairs": len(self.train),
            "validation_pairs": len(held),
            "best_epoch": best["epoch"],
            "validation": _figures(best["mse"], held),
            "history": training.history,
        }
        return self._artifact(training, self.spaces[1].normalised, 1.0, info), held

    def _artifact(self, training: PairTraining, normalise: bool, length: float, info: JsonDict) -> Transformation:
        old_scaling, side_scaling, new_scaling = training.scalings
        return to_transformation(
            training.best_module(),
            old_scaling=old_scaling,
            side_scaling=side_scaling,
            new_scaling=new_scaling,
            old_space=self.spaces[0],
            new_space=self.spaces[1],
            side_model=self.side_model,
            normalise=normalise,
            length=length,
            info=info,
        )

    # ---- the recipe for any number of pairs ----
    def auto(
        self, length: float | None, seconds: float | None, extra: tuple[Floats, Floats | None] | None, *, best: bool
    ) -> tuple[Transformation, Pairs]:
        repeated = self._set_repeated_aside()
        own = self.given is not None
        plan = plan_fit(
            len(self.train),
            self.train.dims,
            two_inputs=self.train.side is not None,
            own_validation=own or self.share is not None,
            seconds=seconds,
        )
        held = self.given
        if held is None and not plan.folds:
            share = plan.held_share if self.share is None else self.share
            self.train, held = split_pairs(self.train, share, self.seed)
        for line in plan.why:
            self._tell(line)
        metric, normalise = self.spaces[1].metric, self.spaces[1].normalised or length is not None
        epochs = sum(c.epochs for c in plan.rungs)
        self._task = self.bar.add_task("fitting h", total=epochs * max(1, plan.folds) + plan.rungs[-1].epochs)
        fit = AutoFit(
            self.train, held, plan, seed=self.seed, device=self.device,
            make_test=lambda new: NeighbourTest.of(new, metric, normalise=normalise, length=length or 1.0),
            tell=self._tell, state=self._state_of, checkpoint_seconds=self.checkpoint_seconds, on_epoch=self._hear,
        )  # fmt: skip
        found = climb(fit)
        if best:
            found = distil(fit, found, extra)
        judged = judge(found, self._tell)
        training, test = found.training, found.test
        mse = float(np.mean((judged.raw - test.new) ** 2, dtype=np.float64))
        info = {
            "config": found.config.to_dict(),
            "choices": self.choices,
            "pairs": len(self.train),
            "repeated_pairs": repeated.repeated if repeated else None,
            "conflicting_pairs": repeated.conflicting if repeated else None,
            "validation_pairs": len(found.judged),
            "cross_fitted": plan.folds > 0,
            "best_epoch": training.best["epoch"],
            "validation": {**_figures(mse, found.judged), "recall_at_10": judged.recall},
            "share_of_h": judged.share,
            "shapes": [{"shape": words, "mflop": m, "recall_at_10": r} for words, m, r in found.recalls],
            "history": training.history,
            "mixed": calibrate_length(test, judged.raw, self.seed, self._tell, parts=found.parts),
        }
        # A space of unit length may have come in other units: it is measured in those, and written as it says.
        written = 1.0 if self.spaces[1].normalised else length or 1.0
        return self._returned(training, judged.share, judged.linear, normalise, written, info), found.judged

    def _returned(
        self, training: PairTraining, share: float, linear: LinearMap, normalise: bool, length: float, info: JsonDict
    ) -> Transformation:
        if share == 0:
            return linear_transformation(
                linear,
                d_old=self.train.dims[0],
                d_side=self.train.dims[1],
                old_space=self.spaces[0],
                new_space=self.spaces[1],
                side_model=self.side_model,
                normalise=normalise,
                length=length,
                info=info,
            )
        h = self._artifact(training, normalise, length, info)
        return h if share == 1 else blend_linear(h, linear, share)

    def _set_repeated_aside(self) -> Any:
        if not self.train.fits_in_memory:
            self._tell("pairs that stand there more than once were not looked for: the set does not fit in memory")
            return None
        found = find_repeated(self.train, self.seed)
        if found.repeated:
            self._tell(f"{found.repeated:,} pairs stood there more than once and were set aside")
            if len(found.first) < 3:
                raise ValueError(f"old: expected at least 3 different pairs, got {len(found.first)}")
            self.train = self.train.part(found.first)
        if found.conflicting:
            line = (
                f"pairs: {found.conflicting:,} of {len(self.train):,} have inputs that stand there with another new "
                "embedding too; h learns their mean"
            )
            self._tell(line)
            warnings.warn(line, FctWarning, stacklevel=4)
        return found


def _figures(mse: float, held: Pairs) -> dict[str, float]:
    """Error and R² of the held-out pairs."""
    variance = float(held.sample(_NORM_SAMPLE, 0).loaded()[2].var(axis=0).mean())
    return {"mse": mse, "r2": 1 - mse / variance if variance > 0 else 0.0}
