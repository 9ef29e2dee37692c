"""One upgrade of a real retrieval system, lived through on real images in a few minutes.

The stages hand each other files and vectors only: once the gallery is on the disk, nothing that belongs to the
upgrade sees its images. What needs them again (new/new and BCT new/new: the price that fct saves) and the picture
read the data set anew at the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fct
from fct.artifact.transformation import Transformation
from fct.atomic_files import refuse_existing, write_text
from fct.backfilling.plan import BackfillPlan
from fct.data import ImageSet, first_classes
from fct.fit.layer_side_info import LayerSideInfo
from fct.fit.recipes import FitConfig
from fct.life.costs import Costs, model_flop
from fct.life.experiment import DataPlan, Experiment, ModelPlan
from fct.life.experiment_data import load_split
from fct.life.gallery_stage import clear_upgraded, read_gallery, upgrade_gallery, write_gallery
from fct.life.stages import Classifier, SpaceNames, Stages, Stopwatch, vectors_of
from fct.life.table_stage import NEW, OLD, SECONDS, WITH, WITHOUT, Measured, Spent, Vectors, measure
from fct.ops.processors import default_threads
from fct.packed_int4 import PackedInt4
from fct.report import Example, ResultTable, Verdict, judge, write_html, write_picture
from fct.spaces import EmbeddingSpace
from fct.terminal import PlainConsole
from fct.types import Floats, Indices

__all__ = ["QuickstartConfig", "QuickstartReport", "run_quickstart"]

_SIDE = 28  # pixels of an image's side
_COLOURS = {WITH: "#2563c9", WITHOUT: "#8fb3ea", OLD: "#8a93a1", NEW: "#8a93a1"}


@dataclass(frozen=True, slots=True)
class QuickstartConfig:
    """What the models get. The defaults are what the README's table was made with.

    dim: length of every embedding.
    old_epochs, new_epochs: passes over the training images; BCT's model gets new_epochs too.
    side_dim: components of the old model's last map of features that are kept as side-information, 4 bits each.
    queries: held-out images that ask; the other held-out images are the gallery.
    fit: the recipe of h, as ``fct.fit_transformation``'s config.
    """

    dim: int = 128
    old_epochs: int = 8
    new_epochs: int = 6
    side_dim: int = 128
    queries: int = 1000
    fit: str | FitConfig = "auto"

    def experiment(self, seed: int) -> Experiment:
        """The upgrade: a small CNN that knows the first five classes, a small ResNet that knows all ten."""
        return Experiment(
            name=f"fashion-mnist-seed{seed}",
            title="Fashion-MNIST: old model on 5 classes, new model on 10",
            data=DataPlan("fashion-mnist"),
            old_classes=5,
            old=ModelPlan("small_cnn", _SIDE, self.old_epochs, self.dim),
            side_info=None,
            new=ModelPlan("small_resnet", _SIDE, self.new_epochs, self.dim),
            h=self.fit.to_dict() if isinstance(self.fit, FitConfig) else self.fit,
            seed=seed,
        )


@dataclass(frozen=True, slots=True)
class QuickstartReport:
    """table, verdict; files: what was written, by name; seconds: the whole of it."""

    table: ResultTable
    verdict: Verdict
    files: dict[str, Path]
    seconds: float


def run_quickstart(
    out: str | Path = "fct-quickstart",
    *,
    data_root: str | Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
    config: QuickstartConfig | None = None,
    progress: bool = True,
    console: PlainConsole | None = None,
) -> QuickstartReport:
    """Old model, side-information, gallery; new model, h, backfill; table, verdict, picture.

    Args:
        out: folder for the files.
        data_root: folder with the four idx files of the full Fashion-MNIST; None: the subset inside the package.
        seed: same seed, same table on the same machine.
        overwrite: whether ``out`` may hold something.
        config: what the models get.
        progress: show bars and what each stage found.
        console: where to print.

    Raises:
        FileExistsError: ``out`` holds something. FileNotFoundError, ArtifactError: no images under ``data_root``.
    """
    settings = config or QuickstartConfig()
    folder = refuse_existing(out, overwrite=overwrite, name="--out", folder=True)
    folder.mkdir(parents=True, exist_ok=True)
    console = console or PlainConsole(quiet=not progress)
    threads = torch.get_num_threads()
    torch.set_num_threads(default_threads())
    try:
        return _Run(folder, data_root, seed, settings, progress, console).all()
    finally:
        torch.set_num_threads(threads)


# ---- the life of the system ----


@dataclass(frozen=True, slots=True)
class _Models:
    """What the stages before the gallery left in memory."""

    old: Classifier
    side: LayerSideInfo
    old_space: EmbeddingSpace


class _Run:
    def __init__(
        self,
        folder: Path,
        data_root: str | Path | None,
        seed: int,
        config: QuickstartConfig,
        progress: bool,
        console: PlainConsole,
    ) -> None:
        self.folder, self.data_root, self.seed, self.config = folder, data_root, seed, config
        self.progress, self.console = progress, console
        self.experiment = config.experiment(seed)
        self.watch = Stopwatch()
        self.costs: tuple[str, ...] = ()
        self.pairs = 0
        self.files = {
            "h": folder / "h.safetensors",
            "old gallery": folder / "gallery-old.parquet",
            "new gallery": folder / "gallery-new",
            "table (JSON)": folder / "table.json",
            "table (Markdown)": folder / "table.md",
            "picture": folder / "quickstart.png",
            "page": folder / "report.html",
        }

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def stages(self, side_model: str = "") -> Stages:
        """The stages on the training images, which are read anew: nothing keeps them between two stages."""
        e = self.experiment
        names = SpaceNames(
            old=f"small-cnn-{e.old_classes}-classes-{e.name}",
            side_model=side_model,
            new=f"small-resnet-10-classes-{e.name}",
        )
        return Stages(experiment=e, images=self.training_images(), names=names, progress=self.progress)

    def training_images(self) -> ImageSet:
        return load_split(self.experiment, "train", self.data_root)

    def embed(self, model: nn.Module, images: ImageSet) -> Floats:
        return vectors_of(self.experiment, model, images, _SIDE)

    def encode(self, side: LayerSideInfo, images: ImageSet) -> PackedInt4:
        codes = side.encode(images.resized(_SIDE).images, progress=False)
        if not isinstance(codes, PackedInt4):
            raise TypeError(f"side: expected one that stores int4, got {side.storage}")
        return codes

    def held_out(self) -> tuple[ImageSet, ImageSet]:
        """(queries, gallery): the test split in two, by seed; no model is trained on either."""
        test = load_split(self.experiment, "test", self.data_root)
        order = np.random.default_rng(self.seed).permutation(len(test))
        count = min(self.config.queries, len(test) // 2)
        return test.take(order[:count]), test.take(order[count:])

    def all(self) -> QuickstartReport:
        begun = time.perf_counter()
        past = self.old_time()
        self.write_gallery(past)
        new_model = self.new_model()
        h, h_without = self.fit(past, new_model)
        plan = self.backfill(h, h_without)
        bct_model = self.bct(past.old)
        table, verdict, found = self.search(past.old.model, new_model, bct_model, h, plan)
        self.report(table, verdict, found)
        seconds = time.perf_counter() - begun
        self.say("")
        self.console.say(verdict.sentence, "")
        self.say("")
        self.console.print(table.to_rich())
        self.say(f"gap: share of the way from old/old to new/new. seconds: {SECONDS}.")
        for sentence in self.costs:
            self.say(sentence)
        self.say("")
        for name, path in self.files.items():
            self.console.print(f"  {name:17} {path}", highlight=False, soft_wrap=True)
        self.say("")
        self.say(f"done in {seconds:.0f} s")
        return QuickstartReport(table, verdict, self.files, seconds)

    # 1
    def old_time(self) -> _Models:
        """The old model on half the classes; on the same images, without their labels, what its last map says."""
        stages = self.stages()
        images, classes = len(stages.old_images), self.experiment.old_classes
        self.console.say("1", f"old model: small CNN, {images:,} images of {classes} classes")
        with self.watch.timed("old"):
            old = stages.old_model(2 * self.seed)
        with self.watch.timed("side"):
            own = self.training_images().of_classes(first_classes(stages.classes, self.experiment.old_classes))
            side = fct.side_info_from(
                old.model, own.resized(_SIDE).images, dim=self.config.side_dim, seed=self.seed, progress=self.progress
            )
        self.say(f"  side-information: {side.dim} components of its layer {side.layer}, {side.bytes_per_item} bytes")
        return _Models(old, side, stages.old_space)

    # 2
    def write_gallery(self, past: _Models) -> None:
        """(id, old embedding, side-information, label) go to disk; the images stay behind in this function."""
        held = self.held_out()[1]
        old, side_info = self.embed(past.old.model, held), self.encode(past.side, held)
        path = self.files["old gallery"]
        write_gallery(path, old, side_info, held.labels, past.old_space)
        size = path.stat().st_size / 1e6
        self.console.say("2", f"gallery: {len(held):,} rows, {size:.1f} MB, in {path}; its images are forgotten")

    # 3
    def new_model(self) -> nn.Module:
        stages = self.stages()
        images = len(stages.images)
        self.console.say("3", f"new model: small ResNet, {images:,} images of all 10 classes, no constraint")
        with self.watch.timed("new"):
            return stages.new_model(2 * self.seed + 1).model

    # 4
    def fit(self, past: _Models, new_model: nn.Module) -> tuple[Transformation, Transformation]:
        """h with and without side-information, on embeddings of the training images, each computed once."""
        stages = self.stages(past.side.id)
        self.pairs = len(stages.images)
        self.console.say("4", f"h: {self.pairs:,} pairs of the training split, embedded once")
        vectors = {}
        for name, model in (("old", past.old.model), ("new", new_model)):
            with self.watch.timed(f"{name} pairs"):
                vectors[name] = stages.embed(model, stages.images, _SIDE)
        with self.watch.timed("side pairs"):
            side_info = self.encode(past.side, self.training_images())
        with self.watch.timed("h"):
            h = stages.fit(vectors["old"], side_info, vectors["new"], self.seed)
        with self.watch.timed("h without"):
            h_without = stages.fit(vectors["old"], None, vectors["new"], self.seed)
        h.save(self.files["h"])
        return h, h_without

    # 5
    def backfill(self, h: Transformation, h_without: Transformation) -> BackfillPlan:
        """The product: a plan, a backfill with its journal, and the proof that nothing is missing or changed."""
        source, scratch = self.files["old gallery"], self.folder / "gallery-new-without-side-info"
        for path in (self.files["new gallery"], scratch):
            clear_upgraded(path)
        plan, report, checked = upgrade_gallery(source, self.files["new gallery"], h, progress=self.progress)
        self.watch.seconds["backfill"] = report.seconds
        _, plain, _ = upgrade_gallery(source, scratch, h_without, progress=self.progress)
        self.watch.seconds["backfill without"] = plain.seconds
        self.files["without side-info"] = scratch
        self.console.say("5", f"backfill: {report.rows_out:,} rows written, {report.rejects} rejected, no image read")
        self.say(f"  plan: {plan.rows:,} rows, {plan.precision}, {plan.rows_per_second:,.0f} a second ({plan.binds})")
        self.say(
            f"  verify: {checked.source_rows:,} rows in the source, {checked.rows_out:,} here, ids and labels of "
            f"{checked.compared:,} the same, {checked.spot_checked:,} vectors recomputed"
        )
        return plan

    def bct(self, old: Classifier) -> nn.Module:
        """The baseline: a new model that was trained to fit the old gallery."""
        stages = self.stages()
        self.say("  baseline: BCT, the same ResNet trained with the old classifier's influence loss")
        with self.watch.timed("bct"):
            return stages.bct_model(old, 2 * self.seed + 1).model

    # 6
    def search(
        self, old_model: nn.Module, new_model: nn.Module, bct_model: nn.Module, h: Transformation, plan: BackfillPlan
    ) -> tuple[ResultTable, Verdict, Mapping[str, Indices]]:
        """Every query model against its gallery: one table."""
        queries, held = self.held_out()
        self.console.say("6", f"{len(queries):,} queries, images that no model was trained on")
        old_gallery = read_gallery(self.files["old gallery"])
        with self.watch.timed("re-embed"):
            re_embedded = self.embed(new_model, held)
        with self.watch.timed("re-embed bct"):
            bct_again = self.embed(bct_model, held)
        measured = measure(
            Vectors(self.embed(old_model, queries), old_gallery.vectors),
            Vectors(self.embed(bct_model, queries), bct_again),
            Vectors(self.embed(new_model, queries), re_embedded),
            read_gallery(self.files["new gallery"]).vectors,
            read_gallery(self.files["without side-info"]).vectors,
            self.spent(),
            queries.labels,
            old_gallery.labels,
            progress=self.progress,
        )
        flop = model_flop(new_model, held.images[:1])
        rate = len(held) / self.watch.seconds["re-embed"]
        costs = Costs(h.flop_per_row, flop, plan.h_rows_per_second, plan.rows_per_second, rate)
        self.costs = costs.sentences()
        table = self.table(measured, len(queries), len(held), plan, costs)
        gain = measured.metrics[WITH].average_precision - measured.metrics[OLD].average_precision
        verdict = judge(table, WITH, lead=_paired_interval(gain, self.seed))
        return table, verdict, measured.found

    def spent(self) -> Spent:
        s = self.watch.seconds
        without = s["old pairs"] + s["new pairs"]
        return Spent(
            new=s["new"],
            bct=s["bct"],
            pairs=without + s["side pairs"],
            pairs_without=without,
            fit=s["h"],
            fit_without=s["h without"],
            rewrite=s["backfill"],
            rewrite_without=s["backfill without"],
            again_new=s["re-embed"],
            again_bct=s["re-embed bct"],
        )

    def table(self, measured: Measured, queries: int, gallery: int, plan: BackfillPlan, costs: Costs) -> ResultTable:
        return ResultTable(
            measured.rows,
            title=self.experiment.title,
            notes=(
                f"{queries:,} queries against {gallery:,} gallery items, all of them images that "
                "no model was trained on; shares in per cent.",
                f"Seconds: {SECONDS}.",
                *self.costs,
            ),
            facts={
                "seed": self.seed,
                "training images": self.pairs,
                "queries": queries,
                "gallery": gallery,
                "backfill, rows a second": round(plan.rows_per_second),
                **costs.facts(),
                "re-embedding, images a second": round(costs.model_rate),
                "threads": default_threads(),
                "fct": fct.__version__,
                "torch": torch.__version__,
            },
        )

    # 7 and 8
    def report(self, table: ResultTable, verdict: Verdict, found: Mapping[str, Indices]) -> None:
        clear_upgraded(self.files.pop("without side-info"))
        contents = {
            **table.to_dict(),
            "stages, seconds": self.watch.seconds,
            "verdict": verdict.to_dict(),
            "config": asdict(self.config),
        }
        write_text(self.files["table (JSON)"], json.dumps(contents, indent=2, allow_nan=False, default=str) + "\n")
        write_text(self.files["table (Markdown)"], f"{table.to_markdown()}\n{verdict.sentence}\n")
        write_picture(
            self.files["picture"],
            list(self.examples(found)),
            table,
            colours=_COLOURS,
            subtitle="One query of each class, drawn at random, and its five nearest gallery items; green: of its "
            "class, dashed red: of another. new: never seen by the old model.",
        )
        write_html(self.files["page"], table, verdict=verdict, picture=self.files["picture"], chosen=WITH)

    def examples(self, found: Mapping[str, Indices]) -> Iterator[Example]:
        """One query of each class, drawn by seed, not chosen."""
        queries, held = self.held_out()
        rng = np.random.default_rng(self.seed)
        for label in np.unique(queries.labels):
            query = int(rng.choice(np.flatnonzero(queries.labels == label)))
            name = queries.class_names[int(label)]
            shown = {
                "old/old: today": OLD,
                "new/old by h: no image read again": WITH,
                "new/new: every image read again": NEW,
            }
            yield Example(
                queries.images[query, 0],
                name if label < self.experiment.old_classes else f"{name} (new)",
                {
                    heading: [(held.images[i, 0], bool(held.labels[i] == label)) for i in found[name][query, :5]]
                    for heading, name in shown.items()
                },
            )


def _paired_interval(difference: Floats, seed: int, resamples: int = 1000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean difference over queries."""
    values = difference[np.isfinite(difference)]
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
