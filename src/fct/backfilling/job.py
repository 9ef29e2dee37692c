"""The job: what is mapped to what, cut into shards once and kept; its fingerprint, its journal, its lock."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from fct.atomic_files import checksum_bytes
from fct.errors import FctError
from fct.gallery.interfaces import Output, Piece, Shard
from fct.gallery.location import Location, Patience
from fct.spaces import EmbeddingSpace

__all__ = [
    "BackfillError",
    "InUseError",
    "Job",
    "Journal",
    "Marker",
    "QualityGateError",
    "RejectLimitError",
    "cut_shards",
    "since",
]

JOB_VERSION = 1


class BackfillError(FctError):
    """The backfill cannot go on, or must not: the message says why and what to do."""


class InUseError(BackfillError):
    """Another process is writing to the destination."""


class QualityGateError(BackfillError):
    """The expected retrieval quality is below what was asked for."""


class RejectLimitError(BackfillError):
    """More rows were rejected than ``max_rejects`` allows."""


def cut_shards(pieces: Sequence[Piece], shard_rows: int) -> list[Shard]:
    """Every row of every piece in exactly one shard of about ``shard_rows``, cut at row groups where there are any.

    A piece's last shard is as short as it comes; a row group larger than two shards is cut inside.
    """
    shards: list[Shard] = []
    first = 0
    for number, piece in enumerate(pieces):
        cuts, done, last = [0], 0, 0
        for rows in piece.groups or (piece.rows,):
            if done + rows - last > shard_rows and done > last:
                cuts.append(done)
                last = done
            while rows > 2 * shard_rows:
                done, rows = done + shard_rows, rows - shard_rows
                cuts.append(done)
                last = done
            if rows > shard_rows:
                cuts.append(done + (rows + 1) // 2)
                last = cuts[-1]
            done += rows
        for a, b in zip(cuts, [*cuts[1:], piece.rows], strict=True):
            if b > a:
                shards.append(Shard(len(shards), number, a, b - a, first + a))
        first += piece.rows
    return shards


def since(default: Any, words: str, *, meaning: bool = False) -> Any:
    """A field of :class:`Job` that came after version 0.1, so that backfills begun without it go on.

    A job that has the default there has the fingerprint and the job.json of one that never heard of the field.

    Args:
        default: what a job means that lacks it. words: names it in a message.
        meaning: whether it changes what the output means: then the fingerprint holds it where it is not the default.
    """
    return field(default=default, kw_only=True, metadata={"words": words, "meaning": meaning})


@dataclass(frozen=True)
class Job:
    """Everything that decides the output's bytes, and the cut into shards. Kept as ``_fct/job.json``.

    source, side: URLs, for people. pieces, side_pieces: what they held when the job was planned.
    vector, side_column: columns; side_column "" where side-information comes from ``side`` or there is none.
    id_column: the column named in rejects/, or "" for row numbers.

    Fields that came later are made by :func:`since`; ``tests/backfilling/test_resuming_0_1.py`` holds jobs of then.
    """

    source: str
    destination: str
    format: str
    pieces: tuple[Piece, ...]
    vector: str
    id_column: str
    side: str
    side_pieces: tuple[Piece, ...]
    side_vector: str
    side_column: str
    keep_side: bool
    transformation: str
    old_space: EmbeddingSpace
    new_space: EmbeddingSpace
    precision: str
    backend: str
    dtype: str
    vector_format: str
    binary_dtype: str
    scale: float
    shard_rows: int
    batch_rows: int

    @property
    def rows(self) -> int:
        return sum(p.rows for p in self.pieces)

    @cached_property
    def shards(self) -> list[Shard]:
        return cut_shards(self.pieces, self.shard_rows)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of h's weights and of what changes the meaning of the output.

        Not in it: shard and batch size, threads, device, backend (each computes the same function at the same
        precision), and where source and destination lie.
        """
        meaning = {
            "pieces": [(p.name, p.rows, p.bytes) for p in self.pieces],
            "side_pieces": [(p.name, p.rows, p.bytes) for p in self.side_pieces],
        } | {
            name: getattr(self, name)
            for name in (
                *("format", "vector", "id_column", "side_vector", "side_column", "keep_side", "transformation"),
                *("precision", "dtype", "vector_format", "binary_dtype", "scale"),
                *(f.name for f in self._later() if f.metadata["meaning"] and getattr(self, f.name) != f.default),
            )
        }
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()

    @classmethod
    def _later(cls) -> list[Field[Any]]:
        return [f for f in fields(cls) if "meaning" in f.metadata]

    def differences(self, other: Job) -> list[str]:
        """What keeps ``other`` from being the same job, in words."""
        found = []
        names = {
            "transformation": "h (another transformation)",
            "precision": "precision",
            "format": "format",
            "vector": "vector column",
            "id_column": "id column",
            "side_column": "side-information column",
            "side_vector": "side-information column",
            "keep_side": "keep_side_info",
            "dtype": "dtype",
            "vector_format": "vector_format",
            "binary_dtype": "binary_dtype",
            "scale": "scale",
        } | {f.name: f.metadata["words"] for f in self._later() if f.metadata["meaning"]}
        for name, words in names.items():
            if getattr(self, name) != getattr(other, name):
                found.append(f"{words}: {getattr(self, name)!r}, now {getattr(other, name)!r}")
        for name, words in (("pieces", "source"), ("side_pieces", "side-information")):
            mine = {p.name: (p.rows, p.bytes) for p in getattr(self, name)}
            theirs = {p.name: (p.rows, p.bytes) for p in getattr(other, name)}
            for piece in sorted(mine.keys() | theirs.keys()):
                if mine.get(piece) != theirs.get(piece):
                    found.append(
                        f"{words} {piece!r}: (rows, bytes) {mine.get(piece, 'none')}, now {theirs.get(piece, 'none')}"
                    )
        return found

    def to_json(self) -> bytes:
        body = {"job": JOB_VERSION, "fingerprint": self.fingerprint, **asdict(self)}
        for unused in (f.name for f in self._later() if getattr(self, f.name) == f.default):
            del body[unused]
        return json.dumps(body, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Job:
        try:
            body = json.loads(data)
            if body.pop("job") != JOB_VERSION:
                raise ValueError("another version of fct wrote it")
            fingerprint = body.pop("fingerprint")
            for name in ("pieces", "side_pieces"):
                body[name] = tuple(Piece(**{**p, "groups": tuple(p["groups"])}) for p in body[name])
            for name in ("old_space", "new_space"):
                body[name] = EmbeddingSpace.from_dict(body[name])
            job = cls(**body)
            if job.fingerprint != fingerprint:
                raise ValueError("its fingerprint does not match its content")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BackfillError(f"destination: {where} is not a job that can be continued: {error}") from error
        return job


@dataclass(frozen=True)
class Marker:
    """What one shard left behind; believed only if it verifies.

    input: XXH64 of the rows as they were read. outputs: files below the destination. rejects: rows that went to
    rejects/. extra: what the destination needs to finish (a Lance fragment).
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
    extra: Any = None

    def to_json(self) -> bytes:
        body = json.dumps(asdict(self), sort_keys=True)
        return json.dumps({"marker": body, "xxh64": checksum_bytes(body.encode())}).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Marker | None:
        """None for what is torn or was changed."""
        try:
            outer = json.loads(data)
            text = outer["marker"]
            if checksum_bytes(text.encode()) != outer["xxh64"]:
                return None
            body = json.loads(text)
            body["outputs"] = tuple(Output(**o) for o in body["outputs"])
            body["rejected"] = Output(**body["rejected"]) if body["rejected"] else None
            return cls(**body)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


class Journal:
    """The folder ``_fct``: job.json, done/<shard>.json, rejects/<shard>.jsonl, and manifest.json, written last.

    No file is ever rewritten as the work goes on: a marker per shard is the whole protocol.
    """

    def __init__(self, root: Location, destination: Location) -> None:
        self.root, self.destination = root, destination

    def job(self) -> Job | None:
        try:
            data = (self.root / "job.json").read_bytes()
        except FileNotFoundError:
            return None
        return Job.from_json(data, str(self.root / "job.json"))

    def start(self, job: Job) -> None:
        (self.root / "job.json").write_bytes(job.to_json())

    def mark(self, marker: Marker) -> None:
        (self.root / f"done/{marker.shard:08d}.json").write_bytes(marker.to_json())

    def marker(self, shard: int) -> Marker | None:
        try:
            return Marker.from_json((self.root / f"done/{shard:08d}.json").read_bytes())
        except FileNotFoundError:
            return None

    def marked(self) -> list[int]:
        names = (self.root / "done").files()
        return [int(n[:-5]) for n in names if n.endswith(".json") and n[:-5].isdigit()]

    def place(self, output: Output) -> Location:
        """Where an output lies: rejects in the journal, rows in the destination."""
        return (self.root if output.name.startswith("rejects/") else self.destination) / output.name

    def trouble(self, marker: Marker | None, shard: Shard, fingerprint: str, *, content: bool) -> str | None:
        """Why a marker is not to be believed, or None. content: read the outputs and compare their checksums too."""
        if marker is None:
            return "has no whole marker"
        if marker.fingerprint != fingerprint or marker.shard != shard.number:
            return "was made by another job"
        if marker.rows_in != shard.rows or marker.rows_out + marker.rejects != marker.rows_in:
            return f"has {marker.rows_out} rows and {marker.rejects} rejects for {shard.rows} rows"
        for output in (*marker.outputs, *([marker.rejected] if marker.rejected else [])):
            place = self.place(output)
            try:
                size = place.version().bytes
                if size != output.bytes:
                    return f"{output.name} has {size} bytes, expected {output.bytes}"
                if content and place.checksum() != output.xxh64:
                    return f"{output.name} does not match its checksum"
            except FileNotFoundError:
                return f"{output.name} is missing"
        return None

    def finish(self, summary: dict[str, Any]) -> None:
        (self.root / "manifest.json").write_bytes(json.dumps(summary, indent=1, sort_keys=True).encode())

    def manifest(self) -> dict[str, Any] | None:
        try:
            found = json.loads((self.root / "manifest.json").read_bytes())
            if not isinstance(found, dict):
                raise ValueError(f"expected an object, got {type(found).__name__}")
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise BackfillError(f"destination: {self.root / 'manifest.json'} is damaged: {error}") from error
        return found

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the destination for this process; raises InUseError when another holds it.

        On a local disk an flock, which the system drops when its holder dies. On an object store, which has none, an
        object with a heartbeat: it is taken over when it has not been renewed for a minute.
        """
        if self.root.is_local:
            with self._flock():
                yield
        else:
            with self._heartbeat():
                yield

    @contextlib.contextmanager
    def _flock(self) -> Iterator[None]:
        import fcntl

        path = self.root.local / "lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise InUseError(
                    f"destination: {self.destination} is being written by {file.read() or 'another process'}; "
                    "wait for it or stop it"
                ) from error
            file.truncate(0)
            file.write(_me())
            file.flush()
            yield

    @contextlib.contextmanager
    def _heartbeat(self, renew: float = 10.0, stale: float = 60.0) -> Iterator[None]:
        place = self.root / "lock"
        hasty = replace(place, patience=Patience(0, min(renew, place.patience.timeout)))
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            holder = json.loads(place.read_bytes())
            if time.time() - holder["time"] < stale and holder["who"] != _me():
                raise InUseError(
                    f"destination: {self.destination} is being written by {holder['who']} "
                    f"({time.time() - holder['time']:.0f} s ago); wait for it, or a minute after it has died"
                )
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(renew):
                with contextlib.suppress(Exception):  # the next beat tries again; shards are safe without
                    hasty.write_bytes(json.dumps({"who": _me(), "time": time.time()}).encode())

        place.write_bytes(json.dumps({"who": _me(), "time": time.time()}).encode())
        thread = threading.Thread(target=beat, name="fct-lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            with contextlib.suppress(Exception):  # a store that is down: the lock goes stale, the first error stands
                hasty.remove()


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
