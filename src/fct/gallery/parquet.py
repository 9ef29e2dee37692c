"""Parquet. Vectors as FixedSizeList, List or binary; page checksums are written, and verified where they are there.

Parquet has no fixed-size list: it stores one as LIST with levels, and takes them apart again. ``binary`` (fixed-length
byte arrays) avoids both; see docs/galleries.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fct.errors import FctError
from fct.gallery.base import VECTOR_KEY, Batches, Piece, Shard
from fct.gallery.files import FileDestination, FileSource
from fct.gallery.location import Location

__all__ = ["ParquetDestination", "ParquetSource"]

_BUFFER = 4 << 20


class ParquetSource(FileSource):
    kind = "parquet"
    suffixes = (".parquet", ".pq")

    def _open(self, file: Location) -> Any:
        try:
            # A buffer instead of whole column chunks: memory does not grow with the row group.
            return pq.ParquetFile(
                file.path if file.is_local else file.open(), buffer_size=_BUFFER, page_checksum_verification=True
            )
        except pa.ArrowInvalid as error:
            raise FctError(f"source: expected a whole Parquet file, {file} is not: {error}") from error

    def file_schema(self, file: Location) -> pa.Schema:
        with self._open(file) as parquet:
            return parquet.schema_arrow

    def groups(self, file: Location) -> list[int]:
        with self._open(file) as parquet:
            return [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]

    def read_file(self, file: Location, piece: Piece, start: int, rows: int, batch_rows: int) -> Batches:
        with self._open(file) as parquet:
            wanted: list[int] = []
            first = skip = 0
            for i in range(parquet.num_row_groups):
                last = first + parquet.metadata.row_group(i).num_rows
                if last > start and first < start + rows:
                    skip = skip if wanted else start - first
                    wanted.append(i)
                first = last
            for batch in parquet.iter_batches(batch_rows, row_groups=wanted, use_threads=True):
                if skip >= batch.num_rows:
                    skip -= batch.num_rows
                    continue
                part = batch.slice(skip, rows)
                skip, rows = 0, rows - part.num_rows
                yield part
                if not rows:
                    return
        if rows:
            raise FctError(f"source: {file} is truncated: it ended {rows} rows early")


class ParquetDestination(FileDestination):
    kind = "parquet"
    suffix = ".parquet"

    def write_file(self, path: Path, shard: Shard, batches: Batches, files: dict[str, Path]) -> None:
        writer: pq.ParquetWriter | None = None
        try:
            for batch in batches:
                if writer is None:
                    # Vectors neither compress nor repeat: no dictionary, no statistics, no codec for them.
                    vector = batch.schema.metadata[VECTOR_KEY].decode()
                    plain = [name for name in batch.schema.names if name != vector]
                    writer = pq.ParquetWriter(
                        path,
                        batch.schema,
                        use_dictionary=plain,
                        write_statistics=plain,
                        compression={**dict.fromkeys(plain, "snappy"), vector: "none"},
                        write_page_checksum=True,
                    )
                writer.write_batch(batch)
        finally:
            if writer is not None:
                writer.close()
