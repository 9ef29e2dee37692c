"""Galleries that are files: which files a path, a folder or a glob means, and what all file formats share."""

from __future__ import annotations

import os
import re
import stat
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from fct.errors import FctError
from fct.gallery.interfaces import Batches, Destination, Piece, Shard, Source
from fct.gallery.location import Location
from fct.gallery.space_tags import SIDE_FILE, side_file_space, space_of_schema, write_side_file
from fct.spaces import EmbeddingSpace

__all__ = ["FileDestination", "FileSource", "find_files", "natural"]


def natural(name: str) -> tuple[Any, ...]:
    """Sorts part-2 before part-10."""
    return tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", name) if p)


def find_files(where: Location, name: str = "source") -> list[Location]:
    """The data files of a folder (at any depth), a glob or a single file, in natural order.

    Names and folders that start with ``_`` or ``.`` are not data; neither are side files.
    """
    if where.is_pattern:
        files = where.find()
        root = where.path[: re.search(r"[*?[]", where.path).start()].rpartition("/")[0]  # type: ignore[union-attr]
    elif where.is_folder():
        files, root = where.find(), where.path.rstrip("/")
    elif where.exists():
        return [where]
    else:
        raise FileNotFoundError(f"{name}: expected a gallery, found nothing at {where}")
    found = []
    for file in files:
        parts = file.path[len(root) :].strip("/").split("/")
        if not any(p.startswith(("_", ".")) for p in parts) and not file.path.endswith(".json"):
            _check_readable(file)
            found.append(file)
    if not found:
        raise FileNotFoundError(f"{name}: expected a gallery, found no data files at {where}")
    return sorted(found, key=lambda f: natural(f.path))


def _check_readable(file: Location) -> None:
    """Raises FctError for what stands among the files and is none: it may mean rows, so it is not passed over."""
    if not file.is_local:
        return
    try:
        kind = os.stat(file.path).st_mode
        file.path.encode()
    except FileNotFoundError:
        raise FctError(f"source: {file} is a link to nothing") from None
    except UnicodeEncodeError:
        raise FctError(f"source: expected file names in UTF-8, got {file.path!a}") from None
    if stat.S_ISDIR(kind):
        raise FctError(
            f"source: {file} is a link to a folder, which is not followed: put the files or links to them here"
        )
    if not stat.S_ISREG(kind):
        raise FctError(f"source: expected files, {file} is none (a pipe, a socket or a device)")


class FileSource(Source):
    """Files of one format, read in natural order of their names. A subclass reads one file's facts and its rows."""

    suffixes: ClassVar[tuple[str, ...]]

    def __init__(self, where: Location, files: Sequence[Location]) -> None:
        self.where = where
        self._files = list(files)

    @property
    def url(self) -> str:
        return str(self.where)

    @property
    def files(self) -> list[Location]:
        return self._files

    def name_of(self, file: Location) -> str:
        """The piece's name: its path below the gallery."""
        root = self.where.path.rstrip("/")
        return file.path[len(root) + 1 :] if file.path.startswith(root + "/") else file.name

    def refresh(self) -> None:
        self._files = find_files(self.where)
        self.__dict__.pop("_by_name", None)

    @cached_property
    def _by_name(self) -> dict[str, Location]:
        return {self.name_of(f): f for f in self._files}

    def file_of(self, piece: Piece) -> Location:
        return self._by_name[piece.name]

    @cached_property
    def schema(self) -> pa.Schema:
        return self.file_schema(self._files[0])

    @property
    def space(self) -> EmbeddingSpace | None:
        written = space_of_schema(self.schema, self.url)
        beside = side_file_space(self.where)
        if beside is None and len(self._files) == 1:
            beside = side_file_space(self._files[0])
        if written is not None and beside is not None:
            written.require_same(beside, f"{self.url}: its schema and its {SIDE_FILE}")
        return written or beside

    def pieces(self) -> list[Piece]:
        pieces = []
        for file in self._files:
            schema = self.file_schema(file)
            if not schema.equals(self.schema):
                raise FctError(
                    f"source: expected the same columns in every file, {file} has {_columns(schema)}, "
                    f"{self._files[0]} has {_columns(self.schema)}"
                )
            space, first = space_of_schema(schema, str(file)), space_of_schema(self.schema, self.url)
            if space is not None and first is not None:
                first.require_same(space, f"source: {file}")
            version = file.version()
            groups = self.groups(file)
            pieces.append(Piece(self.name_of(file), sum(groups), version.bytes, version.stamp, tuple(groups)))
        return pieces

    @abstractmethod
    def file_schema(self, file: Location) -> pa.Schema:
        """Columns of a file. Raises FctError naming the file when it is not whole."""

    @abstractmethod
    def groups(self, file: Location) -> list[int]:
        """Rows of each block that is best read whole; one block where that does not matter."""

    @abstractmethod
    def read_file(self, file: Location, piece: Piece, start: int, rows: int, batch_rows: int) -> Batches: ...

    def read(self, piece: Piece, start: int, rows: int, batch_rows: int) -> Batches:
        file = self.file_of(piece)
        try:
            version = file.version()
        except FileNotFoundError:
            raise FileNotFoundError(f"source: {file} is gone; put it back and start again") from None
        if version.bytes != piece.bytes:
            raise FctError(
                f"source: {file} changed: it had {piece.bytes} bytes when the backfill was planned "
                f"and has {version.bytes}"
            )
        try:
            yield from self.read_file(file, piece, start, rows, batch_rows)
        except (pa.ArrowInvalid, EOFError) as error:
            raise FctError(f"source: {file} is damaged: {error}") from error
        except OSError as error:
            # Arrow says OSError for a bad page; the system's own errors carry an errno.
            if error.errno is None and self.where.is_local:
                raise FctError(f"source: {file} is damaged: {error}") from error
            raise


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{f.name}: {f.type}" for f in schema)


class FileDestination(Destination):
    """One file per shard in a folder, named after the shard; a subclass writes one file."""

    suffix: ClassVar[str]

    def __init__(self, where: Location) -> None:
        self.where = where

    @property
    def url(self) -> str:
        return str(self.where)

    def begin(self, schema: pa.Schema, space: EmbeddingSpace) -> None:
        write_side_file(self.where, space)

    def write(self, shard: Shard, batches: Batches, scratch: Path) -> tuple[Mapping[str, Path], Any]:
        name = f"{shard.name}{self.suffix}"
        files = {name: scratch / name}
        self.write_file(files[name], shard, batches, files)
        return files, None

    @abstractmethod
    def write_file(self, path: Path, shard: Shard, batches: Batches, files: dict[str, Path]) -> None:
        """Writes the batches to ``path``; may add further files to ``files`` (name -> path in the same folder)."""
