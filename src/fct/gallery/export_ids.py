"""Which ids a vector database can take: the rule of each, and that no id stands there twice."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fct.gallery.json_values import plain_array
from fct.scratch import ScratchFolder
from fct.types import Array

__all__ = ["RULES", "IdCheck", "IdRule", "id_kind"]

_UUID = re.compile(r"[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}", re.IGNORECASE)
_HELD = 1 << 24  # ids compared in memory; more of them are spread over files first
_FILES = 256


@dataclass(frozen=True, slots=True)
class IdRule:
    """takes: in words. low, high: of integers. text: whether any text will do, of at most so many bytes (0: none)."""

    takes: str
    low: int
    high: int
    text: int = 0


RULES = {
    "milvus": IdRule("integers of 64 bits or text of at most 65,535 bytes", -(2**63), 2**63 - 1, 65535),
    "qdrant": IdRule("unsigned integers or UUIDs", 0, 2**64 - 1),
    "chroma": IdRule("text or integers, which become text", -(2**63), 2**64 - 1, 1 << 30),
    "pgvector": IdRule("integers of 64 bits, text or UUIDs", -(2**63), 2**63 - 1, 1 << 30),
}


def id_kind(kind: pa.DataType) -> str:
    """ "integer", "text", "uuid", or "" for what can be no id, of a column's type."""
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if getattr(value, "extension_name", "") == "arrow.uuid":
        return "uuid"
    if pa.types.is_integer(value):
        return "integer"
    t = pa.types
    return "text" if t.is_string(value) or t.is_large_string(value) or t.is_string_view(value) else ""


class IdCheck:
    """Looks at every id on its way out; :meth:`close` compares them all.

    Args:
        rule: the database's. column: its name and type, for messages; a type that can be no id is refused at once.
        scratch: a folder for what is too much for memory (8 bytes a row, in 256 files).

    Raises:
        ValueError: here and by every method: an id that the database cannot take, with its row.
    """

    def __init__(self, rule: IdRule, column: str, kind: pa.DataType, scratch: Path) -> None:
        self.rule, self.column = rule, column
        self.kind = id_kind(kind)
        if not self.kind:
            raise ValueError(
                f"id_column: expected {rule.takes}, column {column!r} is {kind}; name another, or '' for row numbers"
            )
        self._keys: list[Array] = []
        self._held = 0
        self._spread: ScratchFolder | None = None
        self._scratch = scratch

    def __call__(self, ids: pa.Array, first: int) -> pa.Array:
        """The ids as the database gets them: int64, uint64 or string. first: the number of the first one's row."""
        ids = plain_array(ids)  # a dictionary may hold a null among its values
        if ids.null_count:
            raise self._wrong(first + pc.index(ids.is_null(), True).as_py(), "null")
        if self.kind == "integer":
            return self._integers(ids, first)
        if self.kind == "uuid":
            keys = [value.int for value in ids.to_pylist()]
            self._keep(np.array([hash(key) for key in keys], np.int64))
            return pa.array([str(uuid.UUID(int=key)) for key in keys], pa.string())
        values = ids.to_pylist()
        for row, value in enumerate(values, first):
            if self.rule.text == 0 and not _UUID.fullmatch(value):
                raise self._wrong(row, repr(value))
            if self.rule.text and (len(value.encode()) > self.rule.text or "\0" in value):
                raise self._wrong(row, f"{value[:40]!r}...")
        self._keep(np.array([hash(_same(value, self.rule)) for value in values], np.int64))
        return ids

    def _integers(self, ids: pa.Array, first: int) -> pa.Array:
        if ids.type == pa.uint64() and self.rule.high >= 2**64 - 1:
            self._keep(ids.to_numpy(zero_copy_only=False).view(np.int64))
            return ids
        wrong = pc.greater(ids, pa.scalar(2**63 - 1, pa.uint64())) if ids.type == pa.uint64() else None
        if self.rule.low == 0 and ids.type != pa.uint64():
            wrong = pc.less(ids, pa.scalar(0, ids.type))
        if wrong is not None and pc.any(wrong).as_py():
            row = pc.index(wrong, True).as_py()
            raise self._wrong(first + row, str(ids[row].as_py()))
        ids = ids.cast(pa.int64())
        self._keep(ids.to_numpy(zero_copy_only=False))
        return ids

    def _wrong(self, row: int, got: str) -> ValueError:
        return ValueError(f"id_column: expected {self.rule.takes} in {self.column!r}, row {row} has {got}")

    def _keep(self, keys: Array) -> None:
        self._keys.append(np.array(keys, np.int64))
        self._held += len(keys)
        if self._held > _HELD:
            self._spill()

    def _spill(self) -> None:
        if self._spread is None:
            self._spread = ScratchFolder(".ids-", self._scratch)
        keys = np.concatenate(self._keys)
        bucket = (keys.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(56)
        for number in range(_FILES):
            with open(self._spread.path / f"{number:03d}", "ab") as file:
                file.write(keys[bucket == number].tobytes())
        self._keys, self._held = [], 0

    def _buckets(self) -> Iterator[Array]:
        if self._spread is None:
            yield np.concatenate(self._keys) if self._keys else np.empty(0, np.int64)
            return
        self._spill()
        for number in range(_FILES):
            yield np.fromfile(self._spread.path / f"{number:03d}", np.int64)

    def close(self, again: Callable[[], Iterator[pa.Array]]) -> None:
        """Refuses an id that stands there twice. again: the ids from the beginning, to tell equal text from equal
        hashes."""
        try:
            twice: set[int] = set()
            for keys in self._buckets():
                keys.sort()
                twice |= set(keys[1:][keys[1:] == keys[:-1]][:1000].tolist())
        finally:
            if self._spread is not None:
                self._spread.remove()
        if not twice:
            return
        seen: dict[Any, int] = {}
        row = 0
        for ids in again():
            for value in plain_array(ids).to_pylist():
                value = _same(value, self.rule)
                known = value if self.kind == "integer" else hash(value)
                if known in twice or (known - 2**64 in twice):
                    if value in seen:
                        raise ValueError(
                            f"id_column: expected every id once in {self.column!r}, rows {seen[value]} and {row} both "
                            f"have {value}: the second would overwrite the first"
                        )
                    seen[value] = row
                row += 1


def _same(value: Any, rule: IdRule) -> Any:
    """What the database compares: a UUID is the same in every spelling, where text stands for one."""
    if isinstance(value, str) and rule.text == 0:
        return uuid.UUID(value).int
    return value.int if isinstance(value, uuid.UUID) else value
