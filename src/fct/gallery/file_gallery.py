"""Galleries that are files: what all file formats share."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from fct.errors import FctError, SpaceMismatchError
from fct.gallery.discovery import find_files, is_partition, natural, partition_columns, root_of, unmarked
from fct.gallery.interfaces import Batches, Destination, Piece, Shard, Source
from fct.gallery.location import Location, Version
from fct.gallery.schemas import RULE, conform, difference, readable, unify
from fct.gallery.space_tags import SIDE_FILE, side_file_space, space_of_schema, write_side_file
from fct.gallery.urls import redacted
from fct.spaces import EmbeddingSpace
from fct.types import JsonDict

__all__ = ["FileDestination", "FileSource", "find_files", "named_errors", "natural"]


class FileSource(Source):
    """Files of one format, read in natural order of their names. A subclass reads one file's facts and its rows.

    Files that spell their columns differently are read as one (:mod:`fct.gallery.schemas`); columns that stand in the
    names of folders come behind the files' own.
    """

    suffixes: ClassVar[tuple[str, ...]]
    of_log: ClassVar[bool] = (
        False  # whether a log or a state says which rows these are, and not the files that lie there
    )

    def __init__(self, location: Location, files: Sequence[Location]) -> None:
        self.location = location
        self._files = list(files)
        self._schema: pa.Schema | None = None  # once known it stays: files that come later must fit it

    @property
    def url(self) -> str:
        return str(self.location)

    @property
    def files(self) -> list[Location]:
        return self._files

    @cached_property
    def _root(self) -> str:
        return root_of(self.location).rstrip("/")

    def name_of(self, file: Location) -> str:
        """The piece's name and identity: its path below the gallery, or below a pattern's fixed part."""
        name = file.path[len(self._root) :].lstrip("/") if file.path.startswith(self._root + "/") else file.name
        return name if file.is_local else redacted(name)

    def partitioned_name(self, file: Location) -> str:
        """:meth:`name_of`, behind the partitions that the gallery's own place ends with: ``g/lang=de`` is one."""
        folders = self._root.split("/")
        while folders and is_partition(folders[-1]):
            folders.pop()
        above = self._root.split("/")[len(folders) :]
        return "/".join([*above, self.name_of(file)])

    def find(self) -> list[Location]:
        """The files as they are now."""
        return find_files(self.location)

    def refresh(self) -> None:
        if self._schema is None:
            _ = self.schema
        self._files = self.find()
        for name in ("_by_name", "_schemas", "_folders"):
            self.__dict__.pop(name, None)

    @cached_property
    def _by_name(self) -> dict[str, Location]:
        return {self.name_of(f): f for f in self._files}

    def file_of(self, piece: Piece) -> Location:
        return self._by_name[piece.name]

    def version_of(self, file: Location) -> Version:
        """What tells a file's content from another without reading it."""
        return file.version()

    @cached_property
    def _schemas(self) -> dict[str, pa.Schema]:
        """The columns in each file, by its path. Raises FctError that names every file that is not whole."""
        found: dict[str, pa.Schema] = {}
        kinds: list[pa.Schema] = []  # the same for all files that spell it the same: compared once, not for each batch
        broken = []
        for file in self._files:
            try:
                schema = self.file_schema(file)
                if not any(s.equals(schema, check_metadata=True) for s in kinds):
                    _ = str(schema), schema.names  # decodes every name, inner ones too
            except UnicodeDecodeError as error:
                broken.append(f"source: expected names of columns in UTF-8, {file} is damaged: {error}")
                continue
            except FctError as error:
                broken.append(str(error))
                continue
            except FileNotFoundError:
                broken.append(f"source: {file} is not there: it was taken away, or the table's log is damaged")
                continue
            same = next((s for s in kinds if s.equals(schema, check_metadata=True)), None)
            if same is None:
                kinds.append(schema)
            found[file.path] = schema if same is None else same
        if broken:
            more = "" if len(broken) == 1 else "; " + "; ".join(b.removeprefix("source: ") for b in broken[1:])
            raise FctError(f"{broken[0]}{more}")
        return found

    @cached_property
    def _folders(self) -> tuple[pa.Schema, dict[str, JsonDict]]:
        """(columns in folders' names, their values by file)."""
        schema, values = partition_columns([self.partitioned_name(file) for file in self._files])
        return schema, {file.path: row for file, row in zip(self._files, values, strict=True)}

    @property
    def schema(self) -> pa.Schema:
        if self._schema is None:
            self._schema = self._unified()
        return self._schema

    def _unified(self) -> pa.Schema:
        schemas = {id(s): (s, path) for path, s in reversed(self._schemas.items())}
        ordered = list(reversed(list(schemas.values())))
        whole = readable(unify([s for s, _ in ordered], [str(self.location.at(path)) for _, path in ordered]))
        for field in self._folders[0]:
            if field.name not in whole.names:
                whole = whole.append(field)
            else:
                self._require_one_meaning(whole.field(field.name))
        return whole

    def _require_one_meaning(self, field: pa.Field) -> None:
        """Raises FctError where a folder's name (``id=3``) cannot be a value of the files' column of that name."""
        for path, row in self._folders[1].items():
            value = row.get(field.name)
            if value is not None and _typed(value, field.type) is None:
                raise FctError(
                    f"source: {self.location.at(path)} lies in a folder that is a value of {field.name!r}, "
                    f"{field.name}={value}, and the files have a column {field.name!r} of {field.type}, which cannot "
                    "hold it: rename the folders or the column, since only one of the two can be read"
                )

    @property
    def notes(self) -> tuple[str, ...]:
        spelled = len({id(s) for s in self._schemas.values()}) > 1 and any(
            not s.equals(next(iter(self._schemas.values()))) for s in self._schemas.values()
        )
        added = [f.name for f in self._folders[0] if f.name in self.schema.names]
        written = "" if self.of_log else unmarked(self.location, self._files)
        return (
            *((written,) if written else ()),
            *((f"source: {RULE}",) if spelled else ()),
            *((f"source: columns from folder names: {', '.join(added)}",) if added else ()),
        )

    @property
    def space(self) -> EmbeddingSpace | None:
        written = space_of_schema(self.schema, self.url)
        beside = side_file_space(self.location)
        if beside is None and len(self._files) == 1:
            beside = side_file_space(self._files[0])
        if written is not None and beside is not None:
            written.require_same(beside, f"{self.url}: its schema and its {SIDE_FILE}")
        return written or beside

    def pieces(self) -> list[Piece]:
        names = [self.name_of(file) for file in self._files]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            which = ", ".join(str(f) for f, name in zip(self._files, names, strict=True) if name == twice)
            raise FctError(f"source: expected each file once, {which} are all named {twice!r} below {self._root}")
        if not self._unified().equals(self.schema):
            lines = "; ".join(difference(self.schema, self._unified()))
            raise FctError(f"source: {self.url} has files whose columns differ from those it began with: {lines}")
        self._require_one_space()
        pieces, broken = [], []
        for file, name in zip(self._files, names, strict=True):
            version = self.version_of(file)
            try:
                groups = self.groups(file)
            except FctError as error:
                broken.append(str(error))
                continue
            pieces.append(Piece(name, sum(groups), version.bytes, version.stamp, tuple(groups)))
        if broken:
            raise FctError("; ".join([broken[0], *(b.removeprefix("source: ") for b in broken[1:])]))
        return pieces

    def _require_one_space(self) -> None:
        """Raises SpaceMismatchError where one file's schema names another space than the others', or none."""
        kinds: dict[int, tuple[EmbeddingSpace | None, Location]] = {}
        for file in self._files:
            schema = self._schemas[file.path]
            if id(schema) not in kinds:
                kinds[id(schema)] = (space_of_schema(schema, str(file)), file)
        spaces = list(kinds.values())
        tagged = [(space, file) for space, file in spaces if space is not None]
        for space, file in tagged[1:]:
            tagged[0][0].require_same(space, f"source: {file}")
        silent = [file for space, file in spaces if space is None]
        if tagged and silent and side_file_space(self.location) is None:
            raise SpaceMismatchError(
                f"source: expected vectors of one space, {tagged[0][1]} says {tagged[0][0]} and {silent[0]} does not "
                "say what it holds: name the one alone, or write it down for the folder with fct.gallery.tag_space"
            )

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
            version = self.version_of(file)
        except FileNotFoundError:
            raise FileNotFoundError(f"source: {file} is gone; put it back and start again") from None
        if version.bytes != piece.bytes:
            raise FctError(
                f"source: {file} changed: it had {piece.bytes} bytes when the backfill was planned "
                f"and has {version.bytes}"
            )
        with named_errors(file, remote=not self.location.is_local):
            for batch in self.read_file(file, piece, start, rows, batch_rows):
                yield self._whole(batch, file)

    def _whole(self, batch: pa.RecordBatch, file: Location) -> pa.RecordBatch:
        """A file's batch under the gallery's schema, the columns of its folders' names added."""
        schema, values = self.schema, self._folders[1][file.path]
        for name, value in values.items():
            if name in batch.schema.names:
                if not self.of_log:
                    _require_equal(batch.column(name), name, value, file)
            else:
                kind = schema.field(name).type
                column = pa.repeat(pa.scalar(value, kind), batch.num_rows)
                batch = batch.append_column(pa.field(name, kind), column)
        return conform(batch, schema)


def _typed(value: object, kind: pa.DataType) -> pa.Scalar | None:
    """A folder's value as one of a column; None where the column cannot hold it."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return None
    try:
        return pa.scalar(str(value)).cast(kind)
    except pa.ArrowException:
        return None


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _require_equal(column: pa.Array, name: str, value: object, file: Location) -> None:
    """Raises FctError where a file's own column says otherwise than the folder that it lies in."""
    values = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
    if value is None:
        same = values.null_count == len(values)
    else:
        try:
            values = values.cast(pa.int32()) if isinstance(value, int) and _is_text(values.type) else values
            want = _typed(value, values.type)
            same = bool(pc.all(pc.fill_null(pc.equal(values, want), False), min_count=0).as_py())
        except pa.ArrowException:
            same = False
    if not same:
        raise FctError(
            f"source: {file} has other values in its column {name!r} than the folder that it lies in says "
            f"({name}={'__HIVE_DEFAULT_PARTITION__' if value is None else value}): only one of the two can be right; "
            "rename the folders or the column"
        )


@contextlib.contextmanager
def named_errors(file: Location, *, remote: bool = False) -> Iterator[None]:
    """Whatever a library says of a file's content comes out as an FctError that names the file."""
    try:
        yield
    except (FctError, FileNotFoundError):
        raise
    except (pa.ArrowException, EOFError, UnicodeDecodeError) as error:
        if "Expected all lists to be of size" in str(error):  # findings/pyarrow_null_fixed_size_list.sh
            raise FctError(
                f"source: {file} has null rows in a column of fixed-size lists, which pyarrow {pa.__version__} does "
                f"not read from Parquet: write that column as lists of any length, or leave its null rows out ({error})"
            ) from error
        raise FctError(f"source: {file} is damaged: {error}") from error
    except OSError as error:
        # Arrow says OSError for a bad page; the system's own errors carry an errno.
        if error.errno is None and not remote:
            raise FctError(f"source: {file} is damaged: {error}") from error
        raise


class FileDestination(Destination):
    """One file per shard in a folder, named after the shard; a subclass writes one file."""

    suffix: ClassVar[str]
    tags_itself: ClassVar[bool] = False  # whether its files name their space, and the journal may lie elsewhere

    def __init__(self, location: Location) -> None:
        self.location = location
        self.beside = True  # whether the space is written beside the files too

    @property
    def url(self) -> str:
        return str(self.location)

    def begin(self, schema: pa.Schema, space: EmbeddingSpace) -> None:
        if self.beside:
            write_side_file(self.location, space)

    def write(self, shard: Shard, batches: Batches, scratch: Path) -> tuple[Mapping[str, Path], object]:
        name = f"{shard.name}{self.suffix}"
        files = {name: scratch / name}
        self.write_file(files[name], shard, batches, files)
        return files, None

    @abstractmethod
    def write_file(self, path: Path, shard: Shard, batches: Batches, files: dict[str, Path]) -> None:
        """Writes the batches to ``path``; may add further files to ``files`` (name -> path in the same folder)."""
