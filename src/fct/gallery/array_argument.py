"""Whatever a user names as vectors or labels, as an array: the one loader of fit, evaluate, search and transform.

``FILE_OR_FOLDER``, ``GLOB``, ``TABLE`` or ``URL``, each with ``:COLUMN`` behind it where there are several columns; an
array in a container (``FILE.npz:MEMBER``, ``FILE.hdf5:/PATH``, ``STORE.zarr:/PATH``) is a gallery of one column.
What :func:`fct.gallery.open_source` opens is loaded here, so that a gallery that a backfill took or wrote is evaluated
as it is. A single local ``.npy`` file is mapped, all else is read into memory.
"""

from __future__ import annotations

import os

import numpy as np
import pyarrow as pa

from fct.gallery.chunked_arrays import ChunkedSource
from fct.gallery.columns import VECTOR_NAMES, pick_column
from fct.gallery.interfaces import Batches, Source
from fct.gallery.location import RetryPolicy, location_of
from fct.gallery.members import split_member
from fct.gallery.npz_files import NpzSource
from fct.gallery.stores import open_source
from fct.gallery.vectors import refuse_bytes_of_codes, vector_block, vector_dim
from fct.types import Access, Array, FileSystem, GalleryLike, StorageOptions

__all__ = ["load_labels", "load_vectors", "map_npy", "split_column"]

_ROWS = 16384


def split_column(location: str, *, storage_options: StorageOptions | None = None) -> tuple[str, str | None]:
    """(gallery, column) of ``FILE_OR_FOLDER:COLUMN``; None where no column is named.

    A name that is there is taken whole, whatever colons it has.

    Examples:
        >>> from fct.gallery import split_column
        >>> split_column("pairs.parquet:old"), split_column("s3://bucket/gallery")
        (('pairs.parquet', 'old'), ('s3://bucket/gallery', None))
    """
    gallery, _, column = location.rpartition(":")
    if not gallery or not column or "/" in column or split_member(location)[1]:
        return location, None
    if "://" not in location and location_of(location).exists():
        return location, None
    return gallery, column


def load_vectors(
    location: GalleryLike,
    *,
    name: str = "vectors",
    column: str | None = None,
    usual: tuple[str, ...] = VECTOR_NAMES,
    binary_dtype: str = "float32",
    filesystem: FileSystem | None = None,
    storage_options: StorageOptions | None = None,
    retry_policy: RetryPolicy | None = None,
) -> Array:
    """The vectors of a gallery as one array.

    Args:
        location: a file, folder, glob, table or URL, with ``:COLUMN`` behind it or not; a :class:`fct.gallery.Source`;
            or whatever else :func:`fct.gallery.open_source` takes.
        name: the argument or option that this is, for messages. column: overrides ``:COLUMN``.
        usual: names by which the column is found where none is given.
        binary_dtype: what a binary column holds, float32 or float16.
        filesystem, storage_options, retry_policy: as :func:`fct.gallery.open_source` has them.

    Returns:
        (n, d) float32, or float16 where that is stored; a read-only map of a single local ``.npy``.

    Raises:
        FileNotFoundError: nothing there. ValueError: no column of vectors, several, or a row that is no vector (null,
        of another length, with a null in it); rows are never left out. FctError: a file that cannot be read.

    Examples:
        >>> import numpy as np, tempfile
        >>> from fct.gallery import load_vectors
        >>> folder = tempfile.mkdtemp()
        >>> np.save(folder + "/a.npy", np.zeros((3, 8), np.float32))
        >>> load_vectors(folder).shape
        (3, 8)
    """
    access: Access = {"filesystem": filesystem, "storage_options": storage_options, "retry_policy": retry_policy}
    source, named = _opened(location, column, name, access)
    mapped = _mapped(source, name)
    if mapped is not None and mapped.ndim == 2 and mapped.dtype in (np.float32, np.float16):
        return mapped
    picked = pick_column(source.schema, named or "auto", usual, name)
    out, at, d = None, 0, None
    total = sum(piece.rows for piece in source.pieces())
    for batch in _batches(source):
        cells = batch.column(picked)
        d = vector_dim(cells, binary_dtype) if d is None else d
        if d is None:
            raise ValueError(f"{name}: row {at} of {source.url} is no vector: null")
        block = vector_block(cells, d, binary_dtype)
        if block.bad:
            row, why = min(block.bad.items())
            more = f" (and {len(block.bad) - 1} more)" if len(block.bad) > 1 else ""
            raise ValueError(f"{name}: row {at + row} of {source.url} is no vector: {why}{more}")
        refuse_bytes_of_codes(cells.type, block.values, f"{name}: column {picked!r} of {source.url}")
        if out is None:
            out = np.empty((total, d), block.values.dtype)
        out[at : at + batch.num_rows] = block.values
        at += batch.num_rows
    if out is None:
        raise ValueError(f"{name}: expected at least one row, {source.url} has none")
    return out


def load_labels(
    location: GalleryLike,
    *,
    name: str = "labels",
    column: str | None = None,
    filesystem: FileSystem | None = None,
    storage_options: StorageOptions | None = None,
    retry_policy: RetryPolicy | None = None,
) -> Array:
    """The labels (or ids) of a gallery as one array: integers, or text in every spelling that Arrow has for it.

    Args:
        location, column, filesystem, storage_options, retry_policy: as :func:`load_vectors` has them; or a ``.npy``
            file or an array of a container (``FILE.npz:MEMBER``) of one dimension.
        name: the argument or option that this is, for messages.

    Returns:
        (n,) int64, uint64, or numpy's unicode strings.

    Raises:
        FileNotFoundError: nothing there. ValueError: no column named, missing values, or values that are no labels
        (floats, lists). FctError: a file that cannot be read.

    Examples:
        >>> import pyarrow as pa, pyarrow.parquet as pq, tempfile
        >>> from fct.gallery import load_labels
        >>> file = tempfile.mkdtemp() + "/a.parquet"
        >>> pq.write_table(pa.table({"label": pa.array(["shoe", "bag", "shoe"]).dictionary_encode()}), file)
        >>> load_labels(file + ":label").tolist()
        ['shoe', 'bag', 'shoe']
    """
    access: Access = {"filesystem": filesystem, "storage_options": storage_options, "retry_policy": retry_policy}
    flat = _flat_npy(location, name, access)
    if flat is not None:
        return label_array(pa.array(flat), name, str(location))
    source, named = _opened(location, column, name, access)
    if isinstance(source, (NpzSource, ChunkedSource)) and source.member:
        return label_array(pa.array(source.flat()), name, source.url)
    names = source.schema.names
    if named not in names:
        raise ValueError(
            f"{name}: expected a column of {source.url} ({', '.join(names)}), got "
            f"{'none' if named is None else repr(named)}; write FILE_OR_FOLDER:COLUMN"
        )
    parts = [label_array(batch.column(named), name, f"{named!r} of {source.url}") for batch in _batches(source)]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def label_array(column: pa.Array, name: str, what: str) -> Array:
    """An Arrow column as labels: (n,) integers or unicode strings. what: for messages, where it comes from."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if column.null_count:
        raise ValueError(f"{name}: expected no missing values, got {column.null_count} in {what}")
    kind = column.type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if _is_text(value):
        if not pa.types.is_dictionary(kind):
            return np.array(column.to_pylist(), dtype=np.str_) if len(column) else np.empty(0, np.str_)
        words = np.array(column.dictionary.to_pylist() or [""], dtype=np.str_)
        return np.asarray(words[column.indices.to_numpy(zero_copy_only=False)])
    if pa.types.is_integer(value) or pa.types.is_boolean(value):
        if pa.types.is_dictionary(kind):
            column = column.dictionary_decode()
        return np.asarray(column.cast(pa.uint64() if value == pa.uint64() else pa.int64()))
    raise ValueError(f"{name}: expected integer or string labels, got {kind} in {what}")


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _opened(location: GalleryLike, column: str | None, name: str, access: Access) -> tuple[Source, str | None]:
    if isinstance(location, (str, os.PathLike)) and column is None and access["filesystem"] is None:
        location, column = split_column(os.fspath(location))
    return open_source(location, **access, name=name), column


def _batches(source: Source) -> Batches:
    for piece in source.pieces():
        yield from source.read(piece, 0, piece.rows, _ROWS)


def _mapped(source: Source, name: str) -> Array | None:
    """The map of a gallery that is one local .npy file."""
    files = getattr(source, "files", None)
    if source.kind != "npy" or files is None or len(files) != 1 or not files[0].is_local:
        return None
    source.pieces()  # refuses what is no whole file of numbers
    return map_npy(files[0].path, name)


def _flat_npy(location: GalleryLike, name: str, access: Access) -> Array | None:
    """A local .npy file of one dimension, which is no gallery."""
    if (
        access["filesystem"] is not None
        or not isinstance(location, (str, os.PathLike))
        or not str(location).endswith(".npy")
    ):
        return None
    place = location_of(location, storage_options=access["storage_options"], name=name)
    if not place.is_local or not place.exists() or place.is_folder():
        return None
    array = map_npy(place.path, name)
    return array if array.ndim == 1 and not array.dtype.names else None


def map_npy(path: str | os.PathLike[str], name: str) -> Array:
    """A local ``.npy`` file of any shape as a read-only memory map; nothing is unpickled. name: for messages."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{name}: expected a .npy file, found none at {path}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{name}: expected a whole .npy array, {path} is not: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name}: expected one .npy array, {path} is an archive of several")
    return array
