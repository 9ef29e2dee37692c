"""Which second reader a gallery has: its rows counted and read by another way than a backfill reads them. What a fault
of fct's readers did to a gallery does not happen here a second time."""

from __future__ import annotations

from pathlib import Path

from fct.backfilling.row_reader import RowReader, WholeReader
from fct.backfilling.second_containers import Hdf5Reader, NpzReader, ZarrReader
from fct.backfilling.second_databases import DatabaseReader
from fct.backfilling.second_files import ClipReader, FileReader, StreamReader, VortexReader
from fct.backfilling.second_tables import DeltaReader, IcebergReader, LanceReader, SavedReader
from fct.gallery.arrow_stream import ArrowStreamSource
from fct.gallery.chunked_arrays import Hdf5Source, ZarrSource
from fct.gallery.clip_folder import ClipSource
from fct.gallery.databases import DatabaseSource
from fct.gallery.delta_table import DeltaSource
from fct.gallery.file_gallery import FileSource
from fct.gallery.iceberg_table import IcebergSource
from fct.gallery.interfaces import Source
from fct.gallery.lance_dataset import LanceSource
from fct.gallery.npz_files import NpzSource
from fct.gallery.saved_dataset import SavedDatasetSource

__all__ = ["second_reader"]


def second_reader(source: Source, lists: Path | None = None) -> RowReader | WholeReader | None:
    """Another way to read the gallery, or None where there is no other: a source class of one's own.

    lists: the folder where a backfill keeps a database's lists of ids.

    Raises:
        MissingExtraError: there is one, and its package is not installed.
    """
    if isinstance(source, DatabaseSource):
        return None if lists is None else DatabaseReader(source, lists)
    if isinstance(source, DeltaSource):
        return DeltaReader(source)
    if isinstance(source, IcebergSource):
        return IcebergReader(source)
    if isinstance(source, LanceSource):
        return LanceReader(source)
    if isinstance(source, SavedDatasetSource):
        return SavedReader(source)
    if isinstance(source, ClipSource):
        return ClipReader(source)
    if isinstance(source, ArrowStreamSource):
        return StreamReader(source)
    if isinstance(source, NpzSource):
        return NpzReader(source)
    if isinstance(source, (Hdf5Source, ZarrSource)):
        return Hdf5Reader(source) if isinstance(source, Hdf5Source) else ZarrReader(source)
    if not isinstance(source, FileSource) or source.of_log:
        return None
    return VortexReader(source) if source.kind == "vortex" else FileReader(source)
