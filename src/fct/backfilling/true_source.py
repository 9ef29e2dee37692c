"""Where the true vectors of a partial backfill come from: a function of the caller's, or a table of ids and vectors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fct.checks import shown
from fct.errors import BackfillError
from fct.gallery.array_argument import load_vectors, split_column
from fct.gallery.beside_rows import load_ids
from fct.gallery.columns import VECTOR_NAMES, pick_id_column
from fct.gallery.interfaces import Source
from fct.gallery.stores import Opening, open_source
from fct.rows import rows_of
from fct.spaces import EmbeddingSpace
from fct.types import Float32s, Id, RowsLike

__all__ = ["AccessCounts", "Id", "Reembed", "TruePairs", "ask_for_vectors", "load_true_pairs", "named_ids", "row_ids"]

Reembed: TypeAlias = Callable[..., object]  # (ids) or (ids, rows) -> (n, d_new)
Floats = npt.NDArray[np.float32]
_UNIT = 0.02
_COUNTS = ("count", "counts", "access_count", "accesses", "hits", "views")


def row_ids(batch: pa.RecordBatch, id_column: str, first: int) -> list[Id]:
    """The ids of a batch's rows; their numbers in the gallery where it has none."""
    if not id_column:
        return list(range(first, first + batch.num_rows))
    ids: list[Id] = batch.column(id_column).to_pylist()
    return ids


def named_ids(ids: Iterable[Id]) -> str:
    """The first three of some ids, for a message."""
    some = list(ids)
    return ", ".join(shown(i) for i in some[:3]) + (f" and {len(some) - 3:,} more" if len(some) > 3 else "")


class TruePairs:
    """Ids and the new model's own vectors of them: a dictionary, held in memory."""

    def __init__(self, ids: Sequence[Id], vectors: Floats, space: EmbeddingSpace) -> None:
        self.vectors = rows_of(vectors, "reembed", d=space.dim, d_why=f"vectors of {space}").float32()
        if len(ids) != len(self.vectors):
            raise ValueError(f"reembed: expected an id for each of {len(self.vectors):,} vectors, got {len(ids):,}")
        if space.normalised and (bad := far_from_unit(self.vectors)) is not None:
            length = float(np.linalg.norm(self.vectors[bad]))
            raise ValueError(
                f"reembed: expected vectors of {space}, of unit length, that of {shown(ids[bad])} has {length:.3g}"
            )
        self._ids = ids
        self._places: dict[Id, int] = {}
        for place, key in enumerate(ids):
            if key is None:
                raise ValueError(f"reembed: expected an id for each vector, row {place} has none")
            other = self._places.setdefault(key, place)
            if other != place and not np.array_equal(self.vectors[other], self.vectors[place]):
                raise ValueError(
                    f"reembed: expected one vector for an id, rows {other} and {place} have two of {key!r}"
                )

    def __len__(self) -> int:
        return len(self.vectors)

    def places(self, ids: Sequence[Id]) -> npt.NDArray[np.int64]:
        """(n,) row of each id's vector, -1 where there is none."""
        return np.fromiter((self._places.get(i, -1) for i in ids), np.int64, len(ids))

    def named(self, rows: Iterable[int]) -> list[str]:
        return [shown(self._ids[row]) for row in rows]

    def unknown(self, seen: set[int]) -> list[int]:
        """Rows of the ids that are not among the places ``seen``; an id that stands twice is one."""
        return [place for place in self._places.values() if place not in seen]


def far_from_unit(vectors: Floats) -> int | None:
    """The first row that is not of unit length, as far as float16 can tell."""
    off = np.abs(np.linalg.norm(vectors, axis=1) - 1) > _UNIT
    return int(off.argmax()) if off.any() else None


def load_true_pairs(location: Any, space: EmbeddingSpace, kind: pa.DataType | None, access: Opening) -> TruePairs:
    """The pairs of ``reembed``.

    Args:
        location: a mapping or an ``.npz`` with "id" and "new", or what :func:`fct.gallery.open_source` takes with a
            column of ids and one of vectors (``new``, or as for any gallery; ``:COLUMN`` names it).
        space: the new one. kind: of the gallery's ids; None where rows go by number. access: as for any store.
    """
    if isinstance(location, (str, os.PathLike)) and os.fspath(location).endswith(".npz"):
        with np.load(location, allow_pickle=False) as file:
            location = {name: file[name] for name in file.files}
    if isinstance(location, Mapping):
        if not {"id", "new"} <= set(location):
            raise ValueError(f"reembed: expected arrays id and new, got {', '.join(sorted(location)) or 'none'}")
        ids: Any = pa.array(np.asarray(location["id"]) if not isinstance(location["id"], list) else location["id"])
        vectors = location["new"]
    else:
        place, column = split_column(os.fspath(location), storage_options=access["storage_options"])
        source = open_source(place, **access, name="reembed")
        if column is None and "new" in source.schema.names:
            column = "new"
        vectors = load_vectors(source, name="reembed", column=column, usual=VECTOR_NAMES)
        ids = _ids_of(source, place)
        if source.space is not None:
            space.require_same(source.space, f"reembed: {source.url}")
    wanted = kind or pa.int64()
    try:
        plain = ids.dictionary_decode() if pa.types.is_dictionary(ids.type) else ids
        plain = plain.combine_chunks() if isinstance(plain, pa.ChunkedArray) else plain
        plain = plain if plain.type.equals(wanted) else pc.cast(plain, _plain_type(wanted))
    except pa.ArrowException as error:
        raise ValueError(f"reembed: expected ids of the gallery's type {wanted}, got {ids.type}: {error}") from error
    return TruePairs(plain.to_pylist(), vectors, space)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _ids_of(source: Source, location: str) -> pa.Array:
    ids = load_ids(source, name="reembed")
    if ids is None:
        raise ValueError(
            f"reembed: expected a column of ids (id, _id, ...), {location} has {', '.join(source.schema.names)}"
        )
    return ids


def ask_for_vectors(
    ask: Reembed, ids: list[Id], rows: pa.RecordBatch | None, space: EmbeddingSpace, *, name: str = "reembed"
) -> tuple[Floats, npt.NDArray[np.bool_], str]:
    """What a caller's function gives for some ids.

    Args:
        ask: the function. ids: of which vectors are wanted. rows: handed over as well unless None.

    Returns:
        ((n, d_new) float32, (n,) which of them may be believed, what is wrong with the others; "" where they are only
        missing: the function gave None for them).

    Raises:
        BackfillError: it raised, or what it gave are not n vectors of the new space.
    """
    try:
        given: Any = ask(ids) if rows is None else ask(ids, rows)
    except Exception as error:
        raise BackfillError(
            f"{name}: the function raised {type(error).__name__}: {error}, for {len(ids)} ids ({named_ids(ids)}); "
            "what is done is kept, and vectors that it gave before are not asked for again"
        ) from error
    there = np.ones(len(ids), bool)
    if isinstance(given, (list, tuple)):
        there[[i for i, vector in enumerate(given[: len(ids)]) if vector is None]] = False
        given = _stacked(given, len(ids), space.dim, name)
    try:
        vectors: Floats = np.asarray(rows_of(given, name, finite=False, allow_empty=True).float32())
    except (TypeError, ValueError) as error:
        raise BackfillError(_misshapen(name, len(ids), space, str(error).partition(": ")[2], ids)) from error
    if vectors.shape != (len(ids), space.dim):
        raise BackfillError(_misshapen(name, len(ids), space, f"got {vectors.shape}", ids))
    wild = np.zeros(len(ids), bool)
    wild[there] = ~np.isfinite(vectors[there]).all(axis=1)
    why = ""
    if wild.any():
        bad = [i for i, w in zip(ids, wild, strict=True) if w]
        why = f"{name}: expected finite vectors, got NaN or infinity for {named_ids(bad)}"
    good = there & ~wild
    if not why and space.normalised and good.any() and (row := far_from_unit(vectors[good])) is not None:
        at = int(np.flatnonzero(good)[row])
        why = (
            f"{name}: expected vectors of {space}, which have unit length, that of {shown(ids[at])} has "
            f"{float(np.linalg.norm(vectors[at])):.3g}"
        )
        good = np.zeros(len(ids), bool)  # all of them are of another model, or of no model
    return vectors, good, why


def _stacked(given: Sequence[RowsLike], n: int, d: int, name: str) -> Float32s:
    """A list of vectors, some of them None, as an array; what is no such list as it is, for the message."""
    if len(given) != n:
        raise BackfillError(f"{name}: expected {n} vectors, one for each id, the function gave {len(given)}")
    out = np.zeros((n, d), np.float32)
    for i, vector in enumerate(given):
        if vector is not None:
            try:
                row = np.asarray(vector, np.float32)
            except (TypeError, ValueError) as error:
                raise BackfillError(f"{name}: expected vectors, the function gave {shown(vector)}") from error
            if row.shape != (d,):
                raise BackfillError(
                    f"{name}: expected vectors of {d} numbers, the function gave one of shape {row.shape}"
                )
            out[i] = row
    return out


def _misshapen(name: str, n: int, space: EmbeddingSpace, got: str, ids: list[Id]) -> str:
    return (
        f"{name}: expected ({n}, {space.dim}), a vector of {space.model_id!r} for each id, from the function, {got} "
        f"({named_ids(ids)}); what is done is kept"
    )


@dataclass(frozen=True)
class AccessCounts:
    """How often each id was asked for."""

    counts: Mapping[Id, float]

    @classmethod
    def load(cls, location: Any, access: Opening) -> AccessCounts:
        """From a table: a column of ids, and one of counts; without one every row is one access."""
        source = open_source(location, **access, name="access_log")
        ids = pick_id_column(source.schema, what="access_log")
        if not ids:
            there = ", ".join(source.schema.names)
            raise ValueError(f"access_log: expected a column of ids (id, _id, ...), {source.url} has {there}")
        count = next((n for n in _COUNTS if n in source.schema.names), "")
        totals: dict[Id, float] = {}
        for piece in source.pieces():
            for batch in source.read(piece, 0, piece.rows, 65536):
                numbers = np.ones(batch.num_rows)
                if count:
                    numbers = np.asarray(pc.cast(batch.column(count), pa.float64()).to_numpy(zero_copy_only=False))
                    if not np.isfinite(numbers).all():
                        raise ValueError(
                            f"access_log: expected a count in each row of {count!r}, {source.url} lacks some"
                        )
                for key, number in zip(batch.column(ids).to_pylist(), numbers.tolist(), strict=True):
                    totals[key] = totals.get(key, 0.0) + number
        return cls(totals)

    def of(self, ids: Sequence[Id]) -> npt.NDArray[np.float64]:
        """(n,) how often; 0 for what is not in the log."""
        return np.fromiter((self.counts.get(i, 0.0) for i in ids), np.float64, len(ids))
