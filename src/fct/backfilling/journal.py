"""The journal: what a backfill writes down beside a gallery, and believes again only when it checks."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from fct.artifact.transformation import Transformation
from fct.atomic_files import checksum_bytes
from fct.backfilling.checked_json import (
    SchemaError,
    anything,
    parse,
    record,
    sealed,
    text,
    unsealed,
    whole,
)
from fct.backfilling.confined import open_confined, read_confined, refuse_links
from fct.backfilling.job import JOB_BYTES, Job
from fct.backfilling.lock import hold
from fct.backfilling.marker import MARKER_BYTES, REJECT_BYTES, Marker, rejects_of
from fct.errors import BackfillError
from fct.gallery.interfaces import Output, Shard
from fct.gallery.location import Location
from fct.gallery.space_tags import OURS
from fct.types import JsonDict

__all__ = ["BEFORE_A_JOB", "Journal", "rejected_rows", "shard_marker", "system_errors"]

_MANIFEST_BYTES = 1 << 20
_H_BYTES = 16 << 30
BEFORE_A_JOB = ("lock", "ids", "side", "claim", "parts")  # what may lie in a journal that has no job.json yet
_FOLDERS = ("done", "rejects", "parts", "true", "chosen")


class Journal:
    """The folder ``_fct``: job.json, done/<shard>.json, rejects/<shard>.jsonl, and manifest.json, written last.

    No file is ever rewritten as the work goes on: a marker per shard is the whole protocol. Nothing in it is trusted:
    sizes, types and names are checked before they are used, and no link is followed.
    """

    def __init__(self, root: Location, destination: Location, *, apart: bool = False) -> None:
        self.root, self.destination = root, destination
        self.apart = apart  # whether nothing but rows lies in the destination's folder
        self.sealed = True  # whether the job that was read carries a checksum
        self._sizes: dict[str, int] = {}  # of remote markers, as they were listed

    # ---- places ----
    def inside(self, name: str) -> Location:
        """``name`` below the journal. Raises BackfillError where a link would lead elsewhere."""
        if self.root.is_local:
            refuse_links(self.root.local.parent, f"{self.root.name}/{name}")
        return self.root / name

    def location(self, output: Output) -> Location:
        """Where an output lies: rejects in the journal, rows in the destination."""
        if output.name.startswith("rejects/"):
            return self.inside(output.name)
        if self.destination.is_local:
            refuse_links(self.destination.local, output.name)
        return self.destination / output.name

    def refuse_links(self) -> None:
        """Raises BackfillError where the journal's folders are links: what is written would land elsewhere."""
        for name in ("", *_FOLDERS, "lock"):
            self.inside(name)

    def read(self, name: str, most: int, size: int | None = None) -> bytes:
        """A file of the journal. Raises FileNotFoundError, or BackfillError for one that is too large or no file."""
        place = self.inside(name)
        if place.is_local:
            data = read_confined(self.root.local.parent, f"{self.root.name}/{name}", most)
        else:
            size = place.version().bytes if size is None else size
            data = place.read_bytes() if size <= most else b""
        if len(data) > most or (not data and size is not None and size > most):
            raise BackfillError(f"destination: {place} is larger than {most:,} bytes: no backfill wrote it; remove it")
        return data

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each file in a folder of the journal, by name; {} where there is no such folder."""
        place = self.inside(folder)
        if not place.is_local:
            return place.sizes()
        try:
            with os.scandir(place.path) as entries:
                return {e.name: e.stat(follow_symlinks=False).st_size for e in entries if not e.is_dir()}
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def scratch(self) -> Path | None:
        """A folder for files in the making, on the disk that they are to lie on; None where that is another's."""
        if self.apart and self.destination.is_local:
            refuse_links(self.destination.local, f"{OURS}/parts")
            return self.destination.local / OURS / "parts"
        return self.inside("parts").local if self.root.is_local else None

    # ---- the job ----
    def job(self) -> Job | None:
        """The job that was begun here. Raises BackfillError where it cannot be continued."""
        try:
            data = self.read("job.json", JOB_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return None
        job = Job.from_json(data, str(self.root / "job.json"))
        self.sealed = Job.has_checksum(data)
        return job

    def start(self, job: Job) -> None:
        with system_errors("the job could not be written down", self.root / "job.json"):
            self.inside("job.json").write_bytes(job.to_json())

    # ---- shards ----
    def mark(self, marker: Marker) -> None:
        self.inside(f"done/{marker.shard:08d}.json").write_bytes(marker.to_json())

    def marker(self, shard: int) -> Marker | None:
        """The shard's marker, or None where there is no whole one."""
        name = f"done/{shard:08d}.json"
        try:
            return Marker.from_json(self.read(name, MARKER_BYTES, self._sizes.get(name)))
        except FileNotFoundError:
            return None

    def marked(self) -> list[int]:
        """Numbers of the shards that have a marker, believable or not."""
        place = self.inside("done")
        if place.is_local:
            names = os.listdir(place.path) if os.path.isdir(place.path) else []
        else:
            self._sizes = {f"done/{name}": size for name, size in self.sizes("done").items()}
            names = [name.partition("/")[2] for name in self._sizes]
        numbers = (int(n[:-5]) for n in names if re.fullmatch(r"[0-9]{8,18}\.json", n))
        return sorted(set(numbers))

    def trouble(
        self, marker: Marker | None, shard: Shard, fingerprint: str | Collection[str], *, content: bool
    ) -> str | None:
        """Why a marker is not to be believed, or None. content: read the outputs and compare their checksums too."""
        if marker is None:
            return "has no whole marker"
        known = (fingerprint,) if isinstance(fingerprint, str) else fingerprint
        if why := marker.contradiction(shard, known):
            return why
        for output in (*marker.outputs, *([marker.rejected] if marker.rejected else [])):
            if why := self._output_trouble(output, content):
                return why
        return None

    def _output_trouble(self, output: Output, content: bool) -> str | None:
        try:
            place = self.location(output)
            if place.is_local:
                base = self.root.local if output.name.startswith("rejects/") else self.destination.local
                os.close(open_confined(base, output.name))
            size = place.version().bytes
            if size != output.bytes:
                return f"{output.name} has {size} bytes, expected {output.bytes}"
            if content and place.checksum() != output.xxh64:
                return f"{output.name} does not match its checksum"
        except FileNotFoundError:
            return f"{output.name} is missing"
        except BackfillError as error:
            return str(error)
        return None

    def rejects(self, marker: Marker, shard: Shard) -> list[tuple[int, str]]:
        """(number in the whole gallery, reason) of the rows that a done shard rejected.

        Raises:
            BackfillError: its lines are not what the marker says.
        """
        if marker.rejected is None:
            return []
        name = marker.rejected.name
        data = self.read(name, min(REJECT_BYTES, marker.rejected.bytes), marker.rejected.bytes)
        if checksum_bytes(data) != marker.rejected.xxh64:
            raise BackfillError(f"{self.root / name} does not match its checksum; run the backfill again")
        return rejects_of(data, shard, marker.rejects, str(self.root / name))

    def rejected_rows(self, marker: Marker, shard: Shard) -> list[int]:
        """Row numbers in the whole gallery that a done shard rejected; raises as :meth:`rejects` does."""
        return [row for row, _ in self.rejects(marker, shard)]

    def sweep(self) -> None:
        """Takes away what processes that are no more left half-written, here and beside the outputs."""
        if not self.root.is_local:
            return  # an object appears whole or not at all
        for parts in {self.root.local / "parts", self.scratch() or self.root.local / "parts"}:
            shutil.rmtree(parts, ignore_errors=True)
        folders = [self.root.local, *(self.root.local / name for name in _FOLDERS)]
        if self.destination.is_local and self.destination.local.is_dir():
            folders.append(self.destination.local)
        for part in (p for folder in folders for p in folder.glob(".*.part")):
            part.unlink(missing_ok=True)  # half-written beside: what fct.atomic_files renames when whole

    # ---- the end ----
    def finish(self, summary: JsonDict) -> None:
        with system_errors("the manifest could not be written", self.root / "manifest.json"):
            self.inside("manifest.json").write_bytes(sealed(dict(sorted(summary.items()))))

    def unfinish(self) -> None:
        """Takes the manifest away: there is more to do."""
        self.inside("manifest.json").remove()

    def manifest(self) -> JsonDict | None:
        """What the finished backfill counted, or None. Raises BackfillError for a damaged one."""
        try:
            body = unsealed(parse(self.read("manifest.json", _MANIFEST_BYTES), _MANIFEST_BYTES))
            return _MANIFEST(body, "")
        except FileNotFoundError:
            return None
        except SchemaError as error:
            raise BackfillError(f"destination: {self.root / 'manifest.json'} is damaged: {error}") from error

    def keep_transformation(self, h: Transformation) -> None:
        """h lies with the gallery, so that it can be checked on its own."""
        with tempfile.TemporaryDirectory() as folder:
            data = h.save(Path(folder) / "h.safetensors").read_bytes()
        with system_errors("h could not be written", self.root / "transformation.safetensors"):
            self.inside("transformation.safetensors").write_bytes(data)

    def transformation(self) -> Transformation:
        """h as it lies with a finished gallery."""
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "h.safetensors"
            copy.write_bytes(self.read("transformation.safetensors", _H_BYTES))
            return Transformation.load(copy)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the destination for this process; raises InUseError when another holds it."""
        self.refuse_links()
        with hold(self.inside("lock"), str(self.destination)):
            yield


@contextmanager
def system_errors(what: str, location: object) -> Iterator[None]:
    """Turns a system's error into a sentence: what could not be done, where, and what now."""
    try:
        yield
    except BackfillError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise BackfillError(
            f"destination: {what} at {location}: {reason}; what is done is kept, start again once this is put right"
        ) from error


def shard_marker(journal: Journal, number: int) -> Marker:
    """The marker of a done shard. Raises BackfillError when there is none."""
    marker = journal.marker(number)
    if marker is None:
        raise BackfillError(f"shard {number} has no whole marker")
    return marker


def rejected_rows(journal: Journal, shard: Shard) -> list[int]:
    """Row numbers in the whole gallery that a done shard rejected."""
    return journal.rejected_rows(shard_marker(journal, shard.number), shard)


_COUNT = whole(0, 1 << 60)
_MANIFEST: Callable[[object, str], JsonDict] = record(
    dict,
    ("rows_in", "rows_out", "rejects", "shards", "old_space", "new_space", "transformation", "precision", "source"),
    format=text(200),
    fingerprint=text(200),
    source=text(65536),
    rows_in=_COUNT,
    rows_out=_COUNT,
    rejects=_COUNT,
    shards=_COUNT,
    old_space=anything,
    new_space=anything,
    transformation=text(200),
    precision=text(200),
)
