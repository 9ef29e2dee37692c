"""One fault of each kind, planted in the product, is found by the machine: each with an example that is aimed at it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import fct.backfilling.compare_columns
import fct.backfilling.job
import fct.backfilling.journal
import fct.backfilling.pipeline
import fct.backfilling.resume
import fct.backfilling.shard_reader
import fct.gallery.bulk
import fct.gallery.bulk_files
import fct.gallery.discovery
import fct.gallery.export_ids
import fct.gallery.file_gallery
import fct.gallery.saved_dataset
import fct.gallery.stores
from fct.gallery import schemas
from fct.gallery.arrow_files import ArrowSource
from fct.gallery.file_gallery import FileSource
from tests.generated.galleries import Drawn
from tests.generated.machine import check

Plant = Callable[[pytest.MonkeyPatch], None]
_PLAIN = Drawn(payload=("text", "time"), bad=(4,))


def _last_of_a_name(patch: pytest.MonkeyPatch) -> None:
    """Files are known by their last name."""

    def file_of(self: Any, piece: Any) -> Any:
        return [f for f in self._files if f.name == piece.name.rpartition("/")[2]][-1]

    patch.setattr(FileSource, "file_of", file_of)


def _no_folders(patch: pytest.MonkeyPatch) -> None:
    """Columns in the names of folders are lost."""
    patch.setattr(fct.gallery.file_gallery, "partition_columns", lambda names: (pa.schema([]), [{} for _ in names]))


def _no_log(patch: pytest.MonkeyPatch) -> None:
    """A table's folder is read, whatever its log says."""
    patch.setattr(fct.gallery.stores, "open_table", lambda *_, **__: None)
    patch.setattr(fct.gallery.discovery, "_refuse_table", lambda *_: None)


def _with_caches(patch: pytest.MonkeyPatch) -> None:
    """All Arrow files of a saved dataset are its rows."""

    def opened(root: Any, place: Any, name: str) -> Any:
        return ArrowSource(root, [root / n for n in root.files() if n.endswith(".arrow")])

    patch.setattr(fct.gallery.saved_dataset, "open_saved_dataset", opened)


def _side_by_place(patch: pytest.MonkeyPatch) -> None:
    """Side-information is joined by its place, whatever the ids say."""
    patch.setattr(fct.backfilling.shard_reader, "require_same_ids", lambda *_: None)


def _ids_by_place(patch: pytest.MonkeyPatch) -> None:
    """An export counts rows instead of taking their ids."""
    patch.setattr(fct.gallery.bulk, "pick_id_column", lambda *_: "")


def _vector_overwritten(patch: pytest.MonkeyPatch) -> None:
    """A payload column called as the vectors are takes their place."""
    patch.setattr(fct.gallery.bulk_files.BulkWriter, "_require_free", lambda *_: None)


def _ids_wrapped(patch: pytest.MonkeyPatch) -> None:
    """Ids past 2^63 become negative."""

    def integers(self: Any, ids: Any, first: int) -> Any:
        return ids.cast(pa.int64(), safe=False)

    patch.setattr(fct.gallery.export_ids.IdCheck, "_integers", integers)


def _shard_twice(patch: pytest.MonkeyPatch) -> None:
    """A shard's rows are written twice, and the next one's not at all."""
    cut = fct.backfilling.job.cut_shards

    def twice(pieces: Any, rows: int) -> Any:
        shards = cut(pieces, rows)
        a, b = next((a, b) for a, b in itertools.pairwise(shards) if (a.piece, a.rows) == (b.piece, b.rows))
        shards[b.number] = dataclasses.replace(a, number=b.number)
        return shards

    patch.setattr(fct.backfilling.job, "cut_shards", twice)


def _border_dropped(patch: pytest.MonkeyPatch) -> None:
    """The last row of a batch is the one before it, once more."""
    cut = fct.backfilling.shard_reader.bounded

    def bounded(batches: Any, rows: int, width: Any) -> Any:
        for batch in cut(batches, rows, width):
            n = batch.num_rows
            yield batch.take(pa.array([*range(n - 1), max(0, n - 2)])) if n > 1 else batch

    patch.setattr(fct.backfilling.shard_reader, "bounded", bounded)


def _payload_shifted(patch: pytest.MonkeyPatch) -> None:
    """Behind a row without a vector, the payload is the row's before."""
    from fct.backfilling.row_mapper import RowMapper

    call = RowMapper.__call__

    def shifted(self: Any, batch: Any, side: Any, first: int, digest: Any = None) -> Any:
        mapped, rejects = call(self, batch, side, first, digest)
        if rejects and "note" in mapped.schema.names:
            at = mapped.schema.get_field_index("note")
            column = batch.column("note").slice(0, mapped.num_rows)
            mapped = mapped.set_column(at, mapped.schema.field(at), column)
        return mapped, rejects

    patch.setattr(RowMapper, "__call__", shifted)


def _times_rounded(patch: pytest.MonkeyPatch) -> None:
    """Times are read in whole milliseconds."""
    whole = FileSource._whole

    def rounded(self: Any, batch: Any, file: Any) -> Any:
        batch = whole(self, batch, file)
        for i, field in enumerate(batch.schema):
            if pa.types.is_timestamp(field.type):
                batch = batch.set_column(
                    i, field, batch.column(i).cast(pa.timestamp("ms"), safe=False).cast(field.type)
                )
        return batch

    patch.setattr(FileSource, "_whole", rounded)


def _labels_mixed(patch: pytest.MonkeyPatch) -> None:
    """A label's number is taken from one file, the labels from another."""

    def conform(batch: Any, schema: Any) -> Any:
        batch = real(batch, schema)
        for i, field in enumerate(batch.schema):
            if pa.types.is_dictionary(field.type):
                old = batch.column(i)
                values = pa.array(sorted(old.dictionary.to_pylist()))
                column = pa.DictionaryArray.from_arrays(old.indices, values.cast(old.dictionary.type))
                batch = batch.set_column(i, field, column)
        return batch

    real = schemas.conform
    patch.setattr(fct.gallery.file_gallery, "conform", conform)


def _outputs_believed(patch: pytest.MonkeyPatch) -> None:
    """A run that goes on does not look whether what was written is there."""
    patch.setattr(fct.backfilling.journal.Journal, "_output_trouble", lambda *_: None)


def _late_files_left(patch: pytest.MonkeyPatch) -> None:
    """Files that came in between are taken for none."""
    pieces = FileSource.pieces
    patch.setattr(FileSource, "pieces", lambda self: [p for p in pieces(self) if "99" not in p.name])


def _wrong_rows_of_side(patch: pytest.MonkeyPatch) -> None:
    """Side-information of a shard begins a row late."""
    rows = fct.backfilling.shard_reader.ShardReader._side_rows

    def late(self: Any, first: int, count: int) -> Any:
        return rows(self, max(0, first - 1), count)

    patch.setattr(fct.backfilling.shard_reader.ShardReader, "_side_rows", late)


def _vectors_of_another_h(patch: pytest.MonkeyPatch) -> None:
    """h's output is a little off in every row."""
    from fct.backfilling.row_mapper import RowMapper

    real = RowMapper._map

    def off(self: Any, old: Any, side: Any, out: Any) -> None:
        real(self, old, side, out)
        if self.job.backend != "ref":
            out += np.float32(0.05)

    patch.setattr(RowMapper, "_map", off)


FAULTS: dict[str, tuple[Plant, Drawn]] = {
    "files of one name": (_last_of_a_name, dataclasses.replace(_PLAIN, layout="equal")),
    "a column of folders lost": (_no_folders, dataclasses.replace(_PLAIN, layout="hive")),
    "the log ignored": (
        _no_log, Drawn(writer="deltalake", fault="deleted rows", spelling="list", ids="text"),
    ),
    "caches read": (_with_caches, Drawn(writer="datasets", fault="deleted rows")),
    "side by place": (_side_by_place, dataclasses.replace(_PLAIN, side="turned")),
    "side a row late": (_wrong_rows_of_side, dataclasses.replace(_PLAIN, side="gallery", ids="none")),
    "ids by place": (_ids_by_place, dataclasses.replace(_PLAIN, ids="text", export="milvus")),
    "a payload called vector": (_vector_overwritten, Drawn(payload=("named vector",), export="milvus")),
    "uint64 wrapped": (_ids_wrapped, Drawn(ids="uint64", export="pgvector")),
    "a shard twice": (_shard_twice, dataclasses.replace(_PLAIN, shard_rows=3)),
    "a row at a border": (_border_dropped, _PLAIN),
    "payload shifted": (_payload_shifted, dataclasses.replace(_PLAIN, null=(7,), spelling="list")),
    "times rounded": (_times_rounded, _PLAIN),
    "labels of another file": (_labels_mixed, Drawn(payload=("category",), writer="pyarrow")),
    "lost outputs believed": (_outputs_believed, dataclasses.replace(_PLAIN, fault="lost output", shard_rows=3)),
    "late files left out": (_late_files_left, dataclasses.replace(_PLAIN, fault="appended")),
    "vectors off": (_vectors_of_another_h, _PLAIN),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, drawn = FAULTS[name]
    (tmp_path / "sound").mkdir()
    check(drawn, tmp_path / "sound")
    plant(monkeypatch)
    (tmp_path / "planted").mkdir()
    with pytest.raises((AssertionError, fct.FctError)):
        check(drawn, tmp_path / "planted")
