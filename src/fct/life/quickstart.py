"""One upgrade of a real retrieval system, lived through on real images in a few minutes.

The stages hand each other files and vectors only: once the gallery is on the disk, nothing that belongs to the
upgrade sees its images. What needs them again (new/new and BCT new/new: the price that fct saves) and the picture
read the data set anew at the end.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fct
from fct.artifact.transformation import Transformation
from fct.atomic_files import refuse_existing, write_text
from fct.data import ImageSet, first_classes, load_fashion_mnist
from fct.fit.bct import train_bct
from fct.fit.images import embed
from fct.fit.loop import TrainConfig
from fct.fit.side_info import train_side_info
from fct.fit.supervised import train_supervised
from fct.fit.transformation_fit import fit_transformation
from fct.life.stages import Costs, clear_upgraded, model_flop, read_gallery, upgrade_gallery, write_gallery
from fct.metrics import RetrievalMetrics, evaluate, recall_at_k
from fct.ops.processors import default_threads
from fct.report import Example, ResultTable, Row, Verdict, judge, write_html, write_picture
from fct.search import topk
from fct.spaces import EmbeddingSpace
from fct.terminal import PlainConsole

__all__ = ["QuickstartConfig", "QuickstartReport", "run_quickstart"]

OLD_CLASSES = 5
WITH, WITHOUT = "new/old, h with side-info", "new/old, h without side-info"
BCT_OLD, BCT_NEW = "BCT new/old", "BCT new/new"
_COLOURS = {WITH: "#2563c9", WITHOUT: "#8fb3ea", "old/old": "#8a93a1", "new/new": "#8a93a1"}
_SECONDS = (
    "seconds: from the day the new training data is there to a searchable gallery on this machine: training the model "
    "that asks, fitting h, and rewriting the gallery (from stored vectors by h, from its images by a network)"
)


@dataclass(frozen=True, slots=True)
class QuickstartConfig:
    """What the models get. The defaults are what the README's table was made with.

    dim: length of every embedding.
    old_epochs, side_epochs, new_epochs: passes over the training images; BCT's model gets new_epochs too.
    queries: held-out images that ask; the other held-out images are the gallery.
    fit: the recipe of h, as ``fct.fit_transformation``'s config.
    """

    dim: int = 128
    old_epochs: int = 8
    side_epochs: int = 20
    new_epochs: int = 6
    queries: int = 1000
    fit: Any = "auto"


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
    folder = refuse_existing(out, overwrite=overwrite, name="--out")
    folder.mkdir(parents=True, exist_ok=True)
    console = console or PlainConsole(quiet=not progress)
    threads = torch.get_num_threads()
    torch.set_num_threads(default_threads())
    try:
        return _Run(folder, data_root, seed, settings, progress, console).all()
    finally:
        torch.set_num_threads(threads)


# ---- the life of the system ----


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
        self.spent: dict[str, float] = {}
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
        name = f"fashion-mnist-seed{seed}"
        self.old_space = EmbeddingSpace(f"small-cnn-{OLD_CLASSES}-classes-{name}", config.dim, normalised=True)
        self.new_space = EmbeddingSpace(f"small-resnet-10-classes-{name}", config.dim, normalised=True)
        self.bct_space = EmbeddingSpace(f"small-resnet-bct-{name}", config.dim, normalised=True)
        self.side_model = f"simclr-{OLD_CLASSES}-classes-{name}"

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.spent[name] = time.perf_counter() - begun

    def _recipe(self, epochs: int, model: int) -> TrainConfig:
        return TrainConfig(epochs=epochs, seed=2 * self.seed + model, device="cpu")

    def _embed(self, model: Any, images: Any) -> Any:
        """(n, dim) float32 of unit length."""
        vectors = embed(model, images)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))

    def _held_out(self) -> tuple[ImageSet, ImageSet]:
        """(queries, gallery): the test split in two, by seed; no model is trained on either."""
        test = load_fashion_mnist("test", self.data_root)
        order = np.random.default_rng(self.seed).permutation(len(test))
        count = min(self.config.queries, len(test) // 2)
        return test.take(order[:count]), test.take(order[count:])

    def all(self) -> QuickstartReport:
        begun = time.perf_counter()
        old_model, old_head, side_model = self.old_time()
        self.write_gallery(old_model, side_model)
        new_model = self.new_model()
        h, h_without = self.fit(old_model, side_model, new_model)
        plan = self.backfill(h, h_without)
        bct_model = self.bct(old_model, old_head)
        table, verdict, found = self.search(old_model, new_model, bct_model, h, plan)
        self.report(table, verdict, found)
        seconds = time.perf_counter() - begun
        self.say("")
        self.console.say(verdict.sentence, "")
        self.say("")
        self.console.print(table.to_rich())
        self.say(f"gap: share of the way from old/old to new/new. {_SECONDS}.")
        for sentence in self.costs:
            self.say(sentence)
        self.say("")
        for name, path in self.files.items():
            self.console.print(f"  {name:17} {path}", highlight=False, soft_wrap=True)
        self.say("")
        self.say(f"done in {seconds:.0f} s")
        return QuickstartReport(table, verdict, self.files, seconds)

    # 1
    def old_time(self) -> tuple[Any, Any, Any]:
        """The old model on half the classes; on the same images, without their labels, the side-information model."""
        train = load_fashion_mnist("train", self.data_root).of_classes(first_classes(10, OLD_CLASSES))
        self.console.say("1", f"old model: small CNN, {len(train.labels):,} images of {OLD_CLASSES} classes")
        with self._timed("old"):
            old, head = train_supervised(
                train.images,
                train.labels,
                classes=OLD_CLASSES,
                backbone="small_cnn",
                dim=self.config.dim,
                config=self._recipe(self.config.old_epochs, 0),
                progress=self.progress,
                describe="  old model",
            )
        self.say("  side-information: SimCLR on the same images, without labels")
        with self._timed("side"):
            side = train_side_info(
                train.images,
                method="simclr",
                dim=self.config.dim,
                epochs=self.config.side_epochs,
                seed=self.seed,
                device="cpu",
                progress=self.progress,
            )
        return old, head, side

    # 2
    def write_gallery(self, old_model: Any, side_model: Any) -> None:
        """(id, old embedding, side-information, label) go to disk; the images stay behind in this function."""
        held = self._held_out()[1]
        old, side_info = self._embed(old_model, held.images), self._embed(side_model, held.images)
        path = self.files["old gallery"]
        write_gallery(path, old, side_info, held.labels, self.old_space)
        size = path.stat().st_size / 1e6
        self.console.say("2", f"gallery: {len(held.labels):,} rows, {size:.1f} MB, in {path}; its images are forgotten")

    # 3
    def new_model(self) -> Any:
        train = load_fashion_mnist("train", self.data_root)
        self.console.say("3", f"new model: small ResNet, {len(train.labels):,} images of all 10 classes, no constraint")
        with self._timed("new"):
            return train_supervised(
                train.images,
                train.labels,
                classes=10,
                backbone="small_resnet",
                dim=self.config.dim,
                config=self._recipe(self.config.new_epochs, 1),
                progress=self.progress,
                describe="  new model",
            )[0]

    # 4
    def fit(self, old_model: Any, side_model: Any, new_model: Any) -> tuple[Transformation, Transformation]:
        """h with and without side-information, on embeddings of the training images, each computed once."""
        train = load_fashion_mnist("train", self.data_root)
        self.console.say("4", f"h: {len(train.labels):,} pairs of the training split, embedded once")
        self.pairs = len(train)
        with self._timed("pairs"):
            old, side, new = (self._embed(m, train.images) for m in (old_model, side_model, new_model))
        fitted = []
        for name, side_info in (("h", side), ("h without", None)):
            with self._timed(name):
                fitted.append(
                    fit_transformation(
                        old,
                        side_info,
                        new,
                        config=self.config.fit,
                        seed=self.seed,
                        device="cpu",
                        progress=self.progress,
                        old_space=self.old_space,
                        new_space=self.new_space,
                        side_model=self.side_model,
                    )
                )
        fitted[0].save(self.files["h"])
        return fitted[0], fitted[1]

    # 5
    def backfill(self, h: Transformation, h_without: Transformation) -> Any:
        """The product: a plan, a backfill with its journal, and the proof that nothing is missing or changed."""
        source, scratch = self.files["old gallery"], self.folder / "gallery-new-without-side-info"
        for path in (self.files["new gallery"], scratch):
            clear_upgraded(path)
        plan, report, checked = upgrade_gallery(source, self.files["new gallery"], h, progress=self.progress)
        self.spent["backfill"] = report.seconds
        _, plain, _ = upgrade_gallery(source, scratch, h_without, progress=self.progress)
        self.spent["backfill without"] = plain.seconds
        self.files["without side-info"] = scratch
        self.console.say("5", f"backfill: {report.rows_out:,} rows written, {report.rejects} rejected, no image read")
        self.say(f"  plan: {plan.rows:,} rows, {plan.precision}, {plan.rows_per_second:,.0f} a second ({plan.binds})")
        self.say(
            f"  verify: {checked.source_rows:,} rows in the source, {checked.rows_out:,} here, ids and labels of "
            f"{checked.compared:,} the same, {checked.spot_checked:,} vectors recomputed"
        )
        return plan

    def bct(self, old_model: Any, old_head: Any) -> Any:
        """The baseline: a new model that was trained to fit the old gallery."""
        train = load_fashion_mnist("train", self.data_root)
        self.say("  baseline: BCT, the same ResNet trained with the old classifier's influence loss")
        with self._timed("bct"):
            return train_bct(
                train.images,
                train.labels,
                classes=10,
                old_model=old_model,
                old_head=old_head,
                backbone="small_resnet",
                config=self._recipe(self.config.new_epochs, 1),
                progress=self.progress,
                describe="  BCT model",
            )[0]

    # 6
    def search(
        self, old_model: Any, new_model: Any, bct_model: Any, h: Transformation, plan: Any
    ) -> tuple[ResultTable, Verdict, dict[str, Any]]:
        """Every query model against its gallery: one table."""
        queries, held = self._held_out()
        self.console.say("6", f"{len(queries.labels):,} queries, images that no model was trained on")
        old_gallery = read_gallery(self.files["old gallery"])
        asked = {name: self._embed(m, queries.images) for name, m in (("old", old_model), ("new", new_model))}
        asked["bct"] = self._embed(bct_model, queries.images)
        with self._timed("re-embed"):
            re_embedded = self._embed(new_model, held.images)
        with self._timed("re-embed bct"):
            bct_again = self._embed(bct_model, held.images)
        costs = Costs(
            h.flop_per_row,
            model_flop(new_model, held.images[:1]),
            plan.h_rows_per_second,
            plan.rows_per_second,
            len(held.labels) / self.spent["re-embed"],
        )
        self.costs = costs.sentences()
        spent, train_h = self.spent, self.spent["new"] + self.spent["pairs"]
        systems = [
            ("old/old", "old", old_gallery.vectors, None),
            (BCT_OLD, "bct", old_gallery.vectors, spent["bct"]),
            (BCT_NEW, "bct", bct_again, spent["bct"] + spent["re-embed bct"]),
            (
                WITHOUT,
                "new",
                read_gallery(self.files["without side-info"]).vectors,
                train_h + spent["h without"] + spent["backfill without"],
            ),
            (
                WITH,
                "new",
                read_gallery(self.files["new gallery"]).vectors,
                train_h + spent["h"] + spent["backfill"],
            ),
            ("new/new", "new", re_embedded, spent["new"] + spent["re-embed"]),
        ]
        found = {name: topk(asked[q], gallery, 10, progress=self.progress).indices for name, q, gallery, _ in systems}
        measured: dict[str, RetrievalMetrics] = {
            name: evaluate(asked[q], gallery, queries.labels, old_gallery.labels, bootstrap=0, progress=self.progress)
            for name, q, gallery, _ in systems
        }
        rows = [
            Row(name, m.cmc1, m.cmc5, m.map, recall_at_k(found[name], found["new/new"], 10), seconds)
            for (name, _, _, seconds), m in zip(systems, measured.values(), strict=True)
        ]
        table = ResultTable(
            tuple(rows),
            title=f"Fashion-MNIST: old model on {OLD_CLASSES} classes, new model on 10",
            notes=(
                f"{len(queries.labels):,} queries against {len(held.labels):,} gallery items, all of them images that "
                "no model was trained on; shares in per cent.",
                _SECONDS[0].upper() + _SECONDS[1:] + ".",
                *self.costs,
            ),
            facts={
                "seed": self.seed,
                "training images": self.pairs,
                "queries": len(queries.labels),
                "gallery": len(held.labels),
                "backfill, rows a second": round(plan.rows_per_second),
                **costs.facts(),
                "re-embedding, images a second": round(len(held.labels) / spent["re-embed"]),
                "threads": default_threads(),
                "fct": fct.__version__,
                "torch": torch.__version__,
            },
        )
        lead = _paired_interval(measured[WITH].average_precision - measured["old/old"].average_precision, self.seed)
        return table, judge(table, WITH, lead=lead), found

    # 7 and 8
    def report(self, table: ResultTable, verdict: Verdict, found: dict[str, Any]) -> None:
        clear_upgraded(self.files.pop("without side-info"))
        contents = {
            **table.to_dict(),
            "stages, seconds": self.spent,
            "verdict": verdict.to_dict(),
            "config": asdict(self.config),
        }
        write_text(self.files["table (JSON)"], json.dumps(contents, indent=2, allow_nan=False, default=str) + "\n")
        write_text(self.files["table (Markdown)"], f"{table.to_markdown()}\n{verdict.sentence}\n")
        write_picture(
            self.files["picture"],
            list(self._examples(found)),
            table,
            colours=_COLOURS,
            subtitle="One query of each class, drawn at random, and its five nearest gallery items; green: of its "
            "class, dashed red: of another. new: never seen by the old model.",
        )
        write_html(self.files["page"], table, verdict=verdict, picture=self.files["picture"], chosen=WITH)

    def _examples(self, found: dict[str, Any]) -> Iterator[Example]:
        """One query of each class, drawn by seed, not chosen."""
        queries, held = self._held_out()
        rng = np.random.default_rng(self.seed)
        for label in np.unique(queries.labels):
            query = int(rng.choice(np.flatnonzero(queries.labels == label)))
            name = queries.class_names[int(label)]
            shown = {
                "old/old: today": "old/old",
                "new/old by h: no image read again": WITH,
                "new/new: every image read again": "new/new",
            }
            yield Example(
                queries.images[query, 0],
                name if label < OLD_CLASSES else f"{name} (new)",
                {
                    heading: [(held.images[i, 0], bool(held.labels[i] == label)) for i in found[name][query, :5]]
                    for heading, name in shown.items()
                },
            )


def _paired_interval(difference: Any, seed: int, resamples: int = 1000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean difference over queries."""
    values = difference[np.isfinite(difference)]
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
