"""Which ids each piece of a served table is: kept beside the journal, so that a table that changes is read like files.

A piece is a list of ids as they were when the table was looked at. Rows that come later are in no list, and make
further lists at the end; a row that is deleted later is still in its list, and is read as a row without a vector.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from fct.atomic_files import checksum_file
from fct.gallery.interfaces import Piece
from fct.scratch import ScratchFolder

__all__ = ["IdLists", "minus"]

_IDS = 1 << 18  # of a list
_FOLDER = "ids"


class IdLists:
    """The lists of one table, in generations: what was there at first, and what had come by each further look.

    label: names the table in the pieces' names, and so in the job's fingerprint. They lie in a folder of their own
    until :meth:`settle` puts them where :meth:`live_in` says.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._home: Path | None = None
        self._temporary: ScratchFolder | None = None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_temporary": None}

    @property
    def _root(self) -> Path:
        if self._home is not None and self._home.is_dir():
            return self._home
        if self._temporary is None:
            self._temporary = ScratchFolder("fct-ids-")
        return self._temporary.path

    def live_in(self, journal: Path) -> None:
        """Says where they are to be kept; what lies there already is what the job was begun with."""
        self._home = journal / _FOLDER

    def settle(self) -> None:
        """Keeps them: all of them are there, or none."""
        if self._home is None or self._home.is_dir() or self._temporary is None:
            return
        part = self._home.with_name(f".{_FOLDER}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(self._temporary.path, part)
        os.replace(part, self._home)

    def generations(self) -> int:
        return len(self._folders())

    def _folders(self) -> list[Path]:
        return sorted(p for p in self._root.iterdir() if p.name.startswith("look-"))

    def add(self, ids: Iterable[pa.Array]) -> int:
        """A further generation of lists; returns how many ids it has. Whole, or not there."""
        number = self.generations()
        part = self._root / f".look-{number:04d}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        count = 0
        for place, some in enumerate(_in_lists(ids)):
            path = part / "list"
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, pa.schema([("id", some.type)])) as writer:
                writer.write_batch(pa.record_batch({"id": some}))
            with open(path, "rb") as data:
                digest = checksum_file(data)
            os.replace(path, part / f"{place:08d}-{digest}-{len(some)}.arrow")
            count += len(some)
        os.replace(part, self._root / f"look-{number:04d}")
        return count

    def pieces(self) -> list[Piece]:
        found = []
        for folder in self._folders():
            for file in sorted(folder.iterdir()):
                rows = int(file.stem.rpartition("-")[2])
                found.append(Piece(f"{self._label}/{folder.name}/{file.stem}", rows, rows * 8, ""))
        return found

    def first(self, piece: Piece) -> bool:
        """Whether a piece was there at the first look: its ids have no others between them then."""
        return piece.name.split("/")[-2] == "look-0000"

    def ids(self, piece: Piece, start: int = 0, rows: int | None = None) -> pa.Array:
        folder, name = piece.name.split("/")[-2:]
        with pa.memory_map(str(self._root / folder / f"{name}.arrow")) as file:
            ids = pa.ipc.open_file(file).read_all()["id"].combine_chunks()
        found = ids.slice(start, rows)
        return pa.concat_arrays([found])  # of its own memory: the map goes

    def all(self) -> pa.ChunkedArray:
        lists = [self.ids(piece) for piece in self.pieces()]
        return pa.chunked_array(lists) if lists else pa.chunked_array([], pa.null())


def _in_lists(ids: Iterable[pa.Array]) -> Iterator[pa.Array]:
    held: list[pa.Array] = []
    count = 0
    for some in ids:
        while len(some):
            take = some.slice(0, _IDS - count)
            held.append(take)
            count, some = count + len(take), some.slice(len(take))
            if count == _IDS:
                yield pa.concat_arrays(held)
                held, count = [], 0
    if held:
        yield pa.concat_arrays(held)


def minus(a: pa.ChunkedArray, b: pa.ChunkedArray) -> pa.Array:
    """The ids of ``a`` that ``b`` has not, in a's order or sorted."""
    if not len(a) or not len(b):
        return a.combine_chunks()
    if pa.types.is_integer(a.type):
        return pa.array(np.setdiff1d(a.to_numpy(), b.to_numpy()), a.type)
    left = pa.table({"id": a}).join(pa.table({"id": b}), "id", join_type="left anti")
    return left["id"].combine_chunks()
