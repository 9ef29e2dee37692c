"""What a finished shard leaves in the journal: its marker, and the lines of its rejected rows."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass

from fct.atomic_files import checksum_bytes
from fct.backfilling.checked_json import (
    Check,
    SchemaError,
    anything,
    either,
    file_name,
    listed,
    number,
    parse,
    record,
    text,
    whole,
)
from fct.errors import BackfillError
from fct.gallery.interfaces import Output, Shard

__all__ = ["MARKER_BYTES", "REJECT_BYTES", "Marker", "ShardTimes", "rejects_of"]

MARKER_BYTES = 16 << 20
REJECT_BYTES = 1 << 30  # of one shard's lines
_LINE_BYTES = 16 << 20
_COUNT = 1 << 60


@dataclass(frozen=True, slots=True)
class ShardTimes:
    """When a shard was made, for people: nothing is decided by it.

    began, ended: seconds since 1970 by the worker's clock: its first row was asked for, its files were in place.
    worker: tells one run of one worker from every other.
    """

    began: float
    ended: float
    worker: str


@dataclass(frozen=True)
class Marker:
    """What one shard left behind; believed only if it verifies.

    input: XXH64 of the rows as they were read. outputs: files below the destination. rejects: rows that went to
    rejects/. extra: what the destination needs to finish (a Lance fragment). piece, start: which rows these are; None
    in markers of version 0.1. digest: how ``input`` was computed, 1 there. true_rows: how many were re-embedded; not
    written where none was. times: None in markers of before there were any.
    """

    shard: int
    fingerprint: str
    rows_in: int
    rows_out: int
    rejects: int
    input: str
    outputs: tuple[Output, ...]
    rejected: Output | None
    backend: str
    extra: object = None
    piece: int | None = None
    start: int | None = None
    digest: int = 1
    true_rows: int = 0
    times: ShardTimes | None = None

    def to_json(self) -> bytes:
        values = asdict(self)
        for name in ("true_rows", "times"):
            if not values[name]:
                del values[name]
        body = json.dumps(values, sort_keys=True)
        return json.dumps({"marker": body, "xxh64": checksum_bytes(body.encode())}).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Marker | None:
        """None for what is torn, was changed, or could not have been written: its shard is done again."""
        try:
            outer = _ENVELOPE(parse(data, MARKER_BYTES), "")
            body: str = outer["marker"]
            if checksum_bytes(body.encode("utf-8", "replace")) != outer["xxh64"]:
                return None
            return _MARKER(parse(body.encode("utf-8", "replace"), MARKER_BYTES), "")
        except (SchemaError, RecursionError, MemoryError):
            return None

    def of(self, shard: Shard) -> bool:
        """Whether it says that it was made of this shard's rows; one of version 0.1 says nothing about it."""
        return self.piece is None or (self.piece, self.start) == (shard.piece, shard.start)

    def contradiction(self, shard: Shard, fingerprints: Collection[str]) -> str | None:
        """What in it cannot be of this shard of a job that has these fingerprints, or None; no file is looked at."""
        if self.fingerprint not in fingerprints or self.shard != shard.number:
            return "was made by another job"
        if not self.of(shard):
            return f"was made of rows from {self.start} on of file {self.piece}, not of {shard.start} of {shard.piece}"
        if self.rows_in != shard.rows or self.rows_out + self.rejects != self.rows_in:
            return f"has {self.rows_out} rows and {self.rejects} rejects for {shard.rows} rows"
        if bool(self.rejects) != (self.rejected is not None):
            return f"names {'no' if self.rejects else 'a'} file for {self.rejects} rejected rows"
        if self.rejected is not None and not self.rejected.name.startswith("rejects/"):
            return f"has its rejects in {self.rejected.name}"
        return None


def rejects_of(data: bytes, shard: Shard, count: int, context: str) -> list[tuple[int, str]]:
    """(number in the whole gallery, reason) of the rows that a shard's lines of rejects name, in order.

    Raises:
        BackfillError: not ``count`` lines, or rows that are not the shard's.
    """
    lines = data.splitlines()
    if len(lines) != count:
        raise BackfillError(
            f"{context} is damaged: expected {count} rejected rows, got {len(lines)} lines; run it again"
        )
    check = _reject(shard)
    try:
        found: list[tuple[int, str]] = [
            check(parse(line, _LINE_BYTES, constants=True), f"line {place}") for place, line in enumerate(lines, 1)
        ]
    except SchemaError as error:
        raise BackfillError(f"{context} is damaged: {error}; remove it and run the backfill again") from error
    rows = [row for row, _ in found]
    if sorted(set(rows)) != rows:
        raise BackfillError(f"{context} is damaged: its rows are not in order; remove it and run the backfill again")
    return found


_DIGEST = text(16, "[0-9a-f]{16}")
_OUTPUT = record(Output, name=file_name, bytes=whole(0, 1 << 62), xxh64=_DIGEST)
_ENVELOPE: Check = record(dict, marker=text(MARKER_BYTES), xxh64=_DIGEST)
_TIMES = record(ShardTimes, began=number(0, 1e11), ended=number(0, 1e11), worker=text(64, "[0-9a-f]{1,64}"))
_MARKER = record(
    Marker,
    ("extra", "piece", "start", "digest", "true_rows", "times"),
    shard=whole(0, _COUNT),
    fingerprint=text(200),
    rows_in=whole(0, _COUNT),
    rows_out=whole(0, _COUNT),
    rejects=whole(0, _COUNT),
    input=text(64),
    outputs=listed(_OUTPUT, 1 << 16),
    rejected=either(_OUTPUT, None),
    backend=text(200),
    extra=anything,
    piece=either(whole(0, _COUNT), None),
    start=either(whole(0, _COUNT), None),
    digest=whole(1, 2),
    true_rows=whole(0, _COUNT),
    times=either(_TIMES, None),
)


def _reject(shard: Shard) -> Check:
    def line(id: object, row: int, reason: str, piece: str = "") -> tuple[int, str]:
        return row, reason

    rows = whole(shard.first, shard.first + shard.rows - 1)
    return record(line, ("piece",), id=anything, row=rows, reason=text(65536), piece=text(65536))
