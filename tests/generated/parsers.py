"""Every parser of files that somebody else may have written, with a valid file of each kind and what it has to give.

A damaged file is refused by an error of fct's that names it, or read as what it holds: where it carries a checksum that
is what was written, else what a second reader finds in it.
"""

from __future__ import annotations

import pickle
import random
import shutil
import struct
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import fct
import fct.backfilling.verify  # once here, and not in every worker
import fct.gallery.stores
from fct.errors import FctError
from tests.generated.mutate import mutated

__all__ = ["JOBS", "Job"]

ROWS, D_OLD, D_NEW = 40, 8, 6
_FCT = str(Path(fct.__file__).parent)
QUICK: dict[str, Any] = {"progress": False, "shard_rows": 8, "batch_rows": 8, "precision": "fp32", "threads": 1}


class Wrong(AssertionError):
    """The file was read as something that it does not hold."""


def numbers(d: int = D_OLD, rows: int = ROWS, seed: int = 0) -> np.ndarray[Any, Any]:
    """Rows that differ, and whose every bit is the same everywhere."""
    return np.random.default_rng(seed).integers(-64, 64, (rows, d)).astype(np.float32) / 64


def transformation() -> fct.Transformation:
    return fct.Transformation.random(D_OLD, D_OLD, D_NEW, inner=16, side_info=False)


def table_of(path: Path) -> pa.Table:
    """A gallery as fct reads it."""
    from fct.gallery import open_source

    source = open_source(str(path))
    batches = [b for p in source.pieces() for b in source.read(p, 0, p.rows, 13)]
    return pa.Table.from_batches(batches, source.schema)


def same(mine: pa.Table, theirs: pa.Table) -> bool:
    """The same values under the same names, whatever the spelling; NaN is itself."""
    if mine.schema.names != theirs.schema.names or len(mine) != len(theirs):
        return False
    return all(_same_column(mine.column(i), theirs.column(i)) for i in range(mine.num_columns))


def _same_column(mine: pa.ChunkedArray, theirs: pa.ChunkedArray) -> bool:
    if mine.equals(theirs):
        return True
    try:
        return repr(mine.to_pylist()) == repr(theirs.to_pylist())
    except (UnicodeDecodeError, OverflowError):  # no values that Python has: then what Arrow shows of them
        return mine.to_string(show_field_names=False) == theirs.to_string(show_field_names=False)


class Job(ABC):
    """A kind of file. files: patterns of what is damaged. text: its content is JSON, or lines of it, where True."""

    files: ClassVar[tuple[str, ...]] = ("*",)
    text: ClassVar[bool] = False
    modules: ClassVar[tuple[str, ...]] = ()  # imported before memory is counted
    memory: ClassVar[int] = 1 << 30

    @abstractmethod
    def make(self, folder: Path) -> None:
        """Writes valid files below ``folder``."""

    @abstractmethod
    def use(self, folder: Path, changed: Path) -> str:
        """Reads the damaged files. Returns what became of them; raises Wrong, or fct's error."""

    def targets(self, folder: Path) -> list[Path]:
        return sorted(f for p in self.files for f in folder.glob(p) if f.is_file())

    def case(self, folder: Path, number: int, seed: int) -> str:
        draw = random.Random(f"{type(self).__name__} {seed} {number}")
        whole, copy = folder / "whole", folder / "copy"
        if not whole.exists():
            whole = folder
            copy = folder.with_name(folder.name + "-copy")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        target = draw.choice(self.targets(copy))
        raw = target.read_bytes()
        data = mutated(raw, draw, text=self.text or target.suffix in (".json", ".jsonl", ".yaml"))
        if data == raw:
            return "unchanged"
        target.unlink()  # what is mapped keeps its bytes
        target.write_bytes(data)
        try:
            return self.use(copy, target)
        except Exception as error:
            if not said_by_fct(error):
                raise
            named = (target.name, str(target.parent), copy.name)
            by_argument = str(error).startswith("id_column: ")  # ids that are sound values, and twice the same
            if not by_argument and not any(name in str(error) for name in named):
                raise Wrong(
                    f"{target.name}: the error does not name the file: {type(error).__name__}: {error}"
                ) from error
            return "refused"


def said_by_fct(error: Exception) -> bool:
    """Whether fct raised this itself, in its own words: an FctError, or a ValueError or FileNotFoundError from a line
    of its own."""
    if isinstance(error, Wrong):
        return False
    if isinstance(error, FctError):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    return type(error) in (ValueError, FileNotFoundError) and last.filename.startswith(_FCT)


# ---- matrices ----
class Npy(Job):
    def make(self, folder: Path) -> None:
        np.save(folder / "c.npy", numbers())
        np.save(folder / "fortran.npy", np.asfortranarray(numbers().astype(np.float64)))
        np.save(folder / "big.npy", numbers().astype(">f2"))
        with open(folder / "v2.npy", "wb") as file:
            np.lib.format.write_array(file, (numbers() * 64).astype(np.int8), version=(2, 0))

    def use(self, folder: Path, changed: Path) -> str:
        found = table_of(changed)["vector"].to_pylist()
        want = np.load(changed, allow_pickle=False).tolist()
        if repr(found) != repr(want):
            raise Wrong(f"{changed.name}: read as {len(found)} other rows")
        return "loaded"


class Bin(Job):
    def make(self, folder: Path) -> None:
        for suffix, values in (
            ("fbin", numbers()),
            ("i8bin", (numbers() * 64).astype(np.int8)),
            ("u8bin", (numbers() * 64).astype(np.uint8)),
        ):
            (folder / f"a.{suffix}").write_bytes(struct.pack("<II", *values.shape) + values.tobytes())

    def use(self, folder: Path, changed: Path) -> str:
        found = table_of(changed)["vector"].to_pylist()
        raw = changed.read_bytes()
        n, d = struct.unpack_from("<II", raw)
        want = np.frombuffer(raw, {".fbin": "<f4", ".i8bin": "i1", ".u8bin": "u1"}[changed.suffix], offset=8)
        if repr(found) != repr(want.reshape(n, d).tolist()):
            raise Wrong(f"{changed.name}: read as {len(found)} other rows")
        return "loaded"


class Npz(Job):
    files = ("pairs.npz",)

    def make(self, folder: Path) -> None:
        np.savez(folder / "pairs.npz", old=numbers(), new=numbers(D_NEW), labels=np.arange(ROWS))

    def use(self, folder: Path, changed: Path) -> str:
        from fct.gallery import load_pairs

        found = load_pairs(changed)
        if "old" in found and not np.array_equal(found["old"], numbers()):  # zip has a checksum of every member
            raise Wrong("pairs.npz: read as other rows")
        return "loaded"


# ---- Arrow ----
def drawn_table() -> pa.Table:
    vectors = numbers()
    return pa.table(
        {
            "id": pa.array([f"item-{i}" for i in range(ROWS)]),
            "old": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), D_OLD),
            "list": pa.array(vectors.tolist(), pa.list_(pa.float32())),
            "label": pa.array(["a", None, "c", "d"] * (ROWS // 4)).dictionary_encode(),
            "nested": pa.array([{"a": i, "b": ["x"] * (i % 3)} if i % 5 else None for i in range(ROWS)]),
            "view": pa.array(["short", "a text that is longer than twelve"] * (ROWS // 2), pa.string_view()),
            "when": pa.array(range(ROWS), pa.timestamp("us", "UTC")),
            "truth": pa.array([True, False] * (ROWS // 2)),
            "map": pa.array([[("k", i)] for i in range(ROWS)], pa.map_(pa.string(), pa.int64())),
        }
    )


class Parquet(Job):
    """page checksums in one of two files, as fct and others write them."""

    def make(self, folder: Path) -> None:
        table = drawn_table()
        pq.write_table(table, folder / "sums.parquet", row_group_size=17, write_page_checksum=True)
        pq.write_table(table, folder / "plain.parquet", row_group_size=17, compression="zstd", use_dictionary=False)

    def use(self, folder: Path, changed: Path) -> str:
        mine = table_of(changed)
        with pq.ParquetFile(changed, page_checksum_verification=True) as file:
            theirs = file.read()
        if not same(mine, theirs):
            raise Wrong(f"{changed.name}: read as other rows than pyarrow's")
        return "loaded"


class Arrow(Job):
    def make(self, folder: Path) -> None:
        table = drawn_table().unify_dictionaries()
        for name, options in (("plain", None), ("zstd", pa.ipc.IpcWriteOptions(compression="zstd"))):
            with pa.ipc.new_file(str(folder / f"{name}.arrow"), table.schema, options=options) as writer:
                writer.write_table(table, max_chunksize=17)
        with pa.ipc.new_stream(str(folder / "stream.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=17)

    def use(self, folder: Path, changed: Path) -> str:
        mine = table_of(changed)
        with pa.OSFile(str(changed)) as file:
            opened = pa.ipc.open_file if changed.read_bytes()[:6] == b"ARROW1" else pa.ipc.open_stream
            theirs = opened(file).read_all()
        theirs.validate(full=True)
        if not same(mine, theirs):
            raise Wrong(f"{changed.name}: read as other rows than pyarrow's")
        return "loaded"


# ---- what fct writes, under a checksum ----
def plain_h(h: fct.Transformation) -> tuple[Any, ...]:
    parts = (h.calibration, h.precisions, h.info)
    return (h.fingerprint, repr(h.tolerance), *(repr(sorted(part.items())) for part in parts))


class Artifact(Job):
    def make(self, folder: Path) -> None:
        from fct.artifact.tolerance import PrecisionEffect

        h = fct.Transformation.random(D_OLD, 4, D_NEW, inner=16, skip=True, normalise=True)
        ranges = {name: np.stack([np.zeros(x.d_in), np.ones(x.d_in)]).astype(np.float32) for name, x in h.layers()}
        effect = PrecisionEffect(**dict.fromkeys(PrecisionEffect.__dataclass_fields__, 0.001))
        h = h.with_(calibration=ranges, precisions={"int8": effect}, info={"rows": 10, "when": "2024"}, length=0.9)
        h.save(folder / "h.safetensors")
        (folder.parent / f"{folder.name}.want").write_bytes(pickle.dumps(plain_h(h)))

    def use(self, folder: Path, changed: Path) -> str:
        h = fct.Transformation.load(changed)
        want = pickle.loads(folder.with_name(folder.name.removesuffix("-copy") + ".want").read_bytes())
        if plain_h(h) != want:
            raise Wrong("another h")
        return "loaded"


class Shadow(Job):
    def make(self, folder: Path) -> None:
        from fct.ops.search import levels

        rows = self.rows()
        fct.prepare_gallery(rows).save(folder / "flat.shadow")
        levels._LEAST_ROWS, levels._GAIN = 1, 1e9  # so that a small gallery has levels too
        fct.prepare_gallery(rows).save(folder / "levels.shadow")

    @staticmethod
    def rows() -> Any:
        return (np.random.default_rng(0).standard_normal((300, 40)) * 0.9 ** np.arange(40)).astype(np.float32)

    def use(self, folder: Path, changed: Path) -> str:
        from fct.ops.search import shadow_file

        rows = self.rows()
        shadow_file._AT_ONCE = random.choice((0, 1 << 30))
        found = fct.topk(rows[:20], fct.PreparedGallery.load(changed, rows), 5).indices
        distances = ((rows[:20, None].astype(np.float64) - rows[None]) ** 2).sum(2)
        if not np.array_equal(found, np.argsort(distances, axis=1, kind="stable")[:, :5]):
            raise Wrong("another answer")
        return "loaded"


class Checkpoint(Job):
    modules = ("fct.fit.training_state",)

    def make(self, folder: Path) -> None:
        import torch

        from fct.fit.training_state import write_state

        tensors = {"a": torch.arange(50.0), "b": torch.ones(3, 4, dtype=torch.float64), "c": torch.tensor(7)}
        write_state(folder / "fit.safetensors", tensors, {"identity": "x", "epoch": 3, "losses": [0.5, 0.25]})

    def use(self, folder: Path, changed: Path) -> str:
        import torch

        from fct.fit.training_state import read_state

        tensors, header = read_state(changed, "x", torch.device("cpu"))
        right = header == {"identity": "x", "epoch": 3, "losses": [0.5, 0.25]} and sorted(tensors) == ["a", "b", "c"]
        if not right or not torch.equal(tensors["a"], torch.arange(50.0)) or int(tensors["c"]) != 7:
            raise Wrong("another state of the fit")
        return "loaded"


class Model(Job):
    """An embedding model's file, and the checkpoint of its training."""

    modules = ("fct.fit.model_file",)

    def make(self, folder: Path) -> None:
        import torch

        from fct.fit.backbones import embedding_model
        from fct.fit.model_file import save_model

        torch.manual_seed(0)
        model = embedding_model("small_cnn", dim=4, image_shape=(1, 8, 8))
        save_model(model, folder / "m.safetensors", backbone="small_cnn", image_shape=(1, 8, 8), info={"epochs": 3})
        (folder.parent / f"{folder.name}.want").write_bytes(pickle.dumps(self.content(model)))

    @staticmethod
    def content(model: Any) -> list[tuple[str, bytes]]:
        return [(name, value.numpy().tobytes()) for name, value in model.state_dict().items()]

    def use(self, folder: Path, changed: Path) -> str:
        from fct.fit.model_file import load_model

        model = load_model(changed)
        want = pickle.loads(folder.with_name(folder.name.removesuffix("-copy") + ".want").read_bytes())
        if self.content(model) != want:
            raise Wrong("another model")
        return "loaded"


# ---- data sets ----
class Idx(Job):
    modules = ("fct.data",)

    def make(self, folder: Path) -> None:
        import gzip
        import lzma

        values = np.arange(60, dtype=np.uint8).reshape(5, 3, 4)
        raw = b"\0\0\x08\x03" + struct.pack(">III", 5, 3, 4) + values.tobytes()
        (folder / "a").write_bytes(raw)
        (folder / "a.gz").write_bytes(gzip.compress(raw, mtime=0))
        (folder / "a.xz").write_bytes(lzma.compress(raw))

    def use(self, folder: Path, changed: Path) -> str:
        from fct.data.idx import read_idx

        found = read_idx(changed)
        if changed.suffix and found.tobytes() != bytes(range(60)):  # both carry checksums
            raise Wrong(f"{changed.name}: other bytes")
        if not changed.suffix:
            raw = changed.read_bytes()
            sizes = struct.unpack_from(f">{raw[3]}I", raw, 4)
            if found.shape != sizes or found.tobytes() != raw[4 + 4 * raw[3] :]:
                raise Wrong(f"{changed.name}: other bytes")
        return "loaded"


class Cifar(Job):
    modules = ("fct.data",)

    def make(self, folder: Path) -> None:
        data = np.random.default_rng(0).integers(0, 256, (7, 3072), dtype=np.uint8)
        for protocol, name in ((2, "train"), (4, "test")):
            batch = {b"data": data, b"fine_labels": list(range(7)), b"filenames": [b"x"] * 7}
            (folder / name).write_bytes(pickle.dumps(batch, protocol))
        (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"apple"] * 100}, 2))

    def use(self, folder: Path, changed: Path) -> str:
        from fct.data import load_cifar100

        for split in ("train", "test"):
            found = load_cifar100(split, folder)
            images = np.asarray(found.images)
            if images.shape[1:] != (3, 32, 32) or images.dtype != np.uint8 or len(found.labels) != len(images):
                raise Wrong("images that are none")
            if len(found.labels) and not 0 <= int(found.labels.min()) <= int(found.labels.max()) < len(
                found.class_names
            ):
                raise Wrong("labels that no class has")
        return "loaded"


class Yaml(Job):
    files = ("*.yaml",)
    modules = ("fct.life", "yaml")

    def make(self, folder: Path) -> None:
        from fct.life import experiment

        for file in experiment._FOLDER.glob("*.yaml"):
            shutil.copy(file, folder)

    def use(self, folder: Path, changed: Path) -> str:
        from fct.life import Experiment, load_experiment

        found = load_experiment(changed)
        if not isinstance(found, Experiment) or not isinstance(found.fit_config, object):
            raise Wrong("no experiment")
        repr(found.to_dict())
        return "loaded"


class Qrels(Job):
    modules = ("fct.judging",)

    def make(self, folder: Path) -> None:
        (folder / "trec.txt").write_text("".join(f"q{i % 3} 0 d{i} {i % 4}\n" for i in range(20)))
        lines = "".join(f"q{i % 3}\td{i}\t{i % 4}\n" for i in range(20))
        (folder / "beir.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)

    def use(self, folder: Path, changed: Path) -> str:
        from fct.judging import read_qrels

        found = read_qrels(changed)
        if not all(isinstance(g, int) for items in found.grades.values() for g in items.values()):
            raise Wrong("a grade that is no number")
        return "loaded"


def _journal_jobs() -> dict[str, Job]:
    from tests.generated.gallery_parsers import GALLERY_JOBS

    return GALLERY_JOBS


_OWN: tuple[Callable[[], Job], ...] = (
    Npy, Bin, Npz, Parquet, Arrow, Artifact, Shadow, Idx, Cifar, Yaml, Qrels, Checkpoint, Model,
)  # fmt: skip
_NAMED: dict[str, Job] = {type(job).__name__.lower(): job for job in (make() for make in _OWN)} | _journal_jobs()
JOBS = dict(sorted(_NAMED.items(), key=lambda entry: bool(entry[1].modules)))  # what imports torch comes last
