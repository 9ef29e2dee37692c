"""The options of :mod:`fct.options.groups` as keywords, for type checkers and editors.

Written by ``python -m tools.option_keywords``; change the groups, not this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Literal, TypedDict

from fct.types import (
    CodeArray,
    CodeNumber,
    DType,
    FileSystem,
    Format,
    GalleryLike,
    Precision,
    StorageOptions,
    TransformationLike,
    VectorFormat,
)

__all__ = [
    "BackfillKeywords",
    "BulkFilesKeywords",
    "ColumnsKeywords",
    "CutKeywords",
    "DatabaseKeywords",
    "ExecutionKeywords",
    "ExportKeywords",
    "GateKeywords",
    "JobKeywords",
    "OutputKeywords",
    "PartialRowsKeywords",
    "PlanKeywords",
    "PredictionKeywords",
    "RunningKeywords",
    "SpotCheckKeywords",
    "StoreAccessKeywords",
    "TransformFileKeywords",
    "VerifyKeywords",
]


class StoreAccessKeywords(TypedDict, total=False):
    """How the stores behind paths and URLs are opened and waited for."""

    filesystem: FileSystem | None
    """An fsspec or pyarrow filesystem that the paths are on; None for what a URL names."""
    storage_options: StorageOptions | None
    """For the store behind a URL, as fsspec names it, or the properties of an Iceberg catalog; may be repeated."""
    retries: int
    """Further attempts, with back-off, where a store may have failed."""
    timeout: float
    """Seconds to wait for a store's answer, and 1 more per MB moved."""


class ColumnsKeywords(TypedDict, total=False):
    """Where in the old gallery the vectors, the side-information and the ids are, and how to read them."""

    side_source: GalleryLike | None
    """Gallery of the side-information, where it is no column: its rows in the same order, unless side_join is id."""
    side_join: Literal["position", "id"]
    """How side_source belongs to the source: row by row, or by their ids, through files on disk, in bounded memory."""
    vector_column: str
    """Column of the old vectors; auto: the only one, or the one named as docs/galleries.md says."""
    side_column: str
    """Column of the side-information; auto: side, side_info, ..."""
    id_column: str
    """Column of the ids, which rejects/ names; auto: id, _id, pk, key or uid."""
    old_model: str | None
    """Id of the model that made the old vectors, where the gallery does not say it."""
    binary_dtype: DType
    """What binary columns hold: float32 or float16."""
    scale: CodeNumber
    """Old vectors are multiplied by this, the step of an 8-bit gallery: a number, an .npy file with one for each
    dimension, or a column with one for each row."""
    offset: CodeNumber
    """Added after that, what a code of 0 stands for: a number, an .npy file or a column likewise."""
    code_ranges: CodeArray | None
    """Instead of both, an .npy file (2, d): the lowest and the highest value of each dimension, which sentence-
    transformers cuts into int8 or uint8 codes."""


class OutputKeywords(TypedDict, total=False):
    """What a new row looks like."""

    vector_format: Literal["auto"] | VectorFormat
    """Parquet and Arrow: fixed_size_list, list or binary."""
    dtype: Literal["auto"] | DType
    """float32 or float16; auto: the source's."""
    keep_side_info: bool
    """Keep the side-information column."""
    mixed: bool
    """Write rows that will stand among re-embedded ones: of the length that was measured when h was fitted."""


class PartialRowsKeywords(TypedDict, total=False):
    """Which rows get the new model's own vectors instead of mapped ones, and where these come from."""

    reembed: str | PathLike[str] | Mapping[str, object] | Callable[..., object] | None
    """True vectors for a part of the rows: a table or .npz of ids and vectors of the new model; from Python also a
    function from a list of ids to (n, d_new), None in the place of a vector that there is not."""
    budget: float | None
    """Share of the rows to re-embed, from 0 to 1; by default all that a table has."""
    order: str
    """Which rows first: random; access (access_log); variance (1 - |h|^2, a diagnostic: measured no better than
    random); or a column of numbers, the highest first."""
    access_log: GalleryLike | None
    """For order access: a table of ids, and counts or a row for each access."""
    reembed_seed: int
    """Of the choice by lot."""
    reembed_ids: int
    """Ids that the function is asked for at once."""
    reembed_payload: bool
    """Call the function with (ids, rows), rows a pyarrow.RecordBatch of all their columns."""
    true_column: str
    """Name of the column that says which rows are true."""


class ExecutionKeywords(TypedDict, total=False):
    """What h runs on."""

    precision: Precision
    """fp32, bf16, int8, on a GPU fp16 and fp8 besides, or auto: the fastest that h allows."""
    device: str
    """cpu, cuda, cuda:1, ..."""
    backend: str | None
    """Force one: cpu, torch, triton, cuda, ref; it runs or says why not. triton, cuda: with --device cuda."""
    threads: int | None
    """CPU threads; by default all."""


class CutKeywords(TypedDict, total=False):
    """The new gallery's files: their format, and how it is cut into shards."""

    format: Literal["auto"] | Format
    """npy, bin, parquet, arrow, vortex, lance or delta; auto: the source's."""
    shard_rows: int | None
    """Rows of a shard; by default as many as take about 128 MB."""
    batch_rows: int | None
    """Rows mapped at once; by default as many as take about 64 MB, float64 lists 16 MB."""


class DatabaseKeywords(TypedDict, total=False):
    """Where a job's journal lies, and what a database needs beside its address."""

    journal: str | PathLike[str] | None
    """Folder of this machine for the journal: of a database, which has no place for files, or of a folder of parquet or
    arrow files in which nothing but these is to lie."""
    max_rows_per_s: float | None
    """Rows a second at most, so that a live database keeps answering."""
    switch_alias: bool
    """Point the collection's alias at the new one when all rows are there."""


class GateKeywords(TypedDict, total=False):
    """What retrieval quality a backfill must promise, on held-out pairs and on queries of your own."""

    pairs: str | PathLike[str] | Mapping[str, object] | None
    """Held-out pairs, .npz with old, side, new and perhaps labels."""
    min_gap_closed: float | None
    """Refuse (exit code 3) below this share of the mAP gap closed."""
    min_recall: float | None
    """Refuse (exit code 3) below this recall@10 on the pairs."""
    queries: str | PathLike[str] | Mapping[str, object] | None
    """Queries of your own, embedded by both models: a table or an .npz with id, old and new."""
    qrels: object
    """What answers them: a file of TREC or BEIR, or a table with query, item and grade; items are ids of the source.
    No-go and inconclusive are refused (exit code 3)."""
    min_ndcg: float | None
    """Refuse (exit code 3) below this nDCG@10 of the mapped rows on these queries."""
    min_query_recall: float | None
    """Refuse (exit code 3) below this recall@10 of the relevant items."""
    ndcg_margin: float
    """Loss of nDCG@10 against the old gallery, from 0 to 1, that you accept for other gains."""
    allow_inconclusive: bool
    """Go on where the queries decide nothing: too few, or an interval with both a gain and a loss in it."""


class PredictionKeywords(TypedDict, total=False):
    """What a plan measures, and what it is told for its prediction."""

    workers: int
    """Machines like this one, for the prediction."""
    price_per_hour: float | None
    """What one machine costs, in your currency."""
    upload_mb_per_s: float | None
    """10^6 bytes a second that one machine uploads; a plan cannot measure it."""
    price_per_million_embeddings: float | None
    """What a million true vectors of a partial backfill cost."""
    embeddings_per_s: float | None
    """True vectors a second that the new model gives, for the time of a partial backfill; a plan asks for none."""
    sample_rows: int
    """Rows of the sample that is looked at."""
    measure_seconds: float
    """How long h is measured, and reading and writing together."""
    expect_rows: int | None
    """Rows that the source must have, from your own table: another number is refused."""


class RunningKeywords(TypedDict, total=False):
    """How a backfill runs, and when it stops."""

    max_rejects: int | None
    """Stop once more rows than this were rejected; by default no limit."""
    ray: str | None
    """Run on Ray: auto, local, or a cluster's address."""
    ray_cpus: int
    """CPUs of each Ray worker."""
    trust_sizes: bool
    """On a restart, believe sizes without reading checksums."""
    expect_rows: int | None
    """Rows that the source must have, from your own table: another number is refused before anything is written (with
    --follow: at the end)."""
    follow: bool
    """Map files that come while the gallery is read in a second pass, and so on until none is left."""
    progress: bool
    """Show a progress bar."""


class SpotCheckKeywords(TypedDict, total=False):
    """Against what a finished gallery is checked."""

    source: GalleryLike | None
    """The old gallery: its rows are counted by another reader, ids and payload of all rows compared. Only what is named
    is opened."""
    side_source: GalleryLike | None
    """Gallery of the side-information, where it is no column of the source."""
    side_join: Literal["auto", "position", "id"]
    """How it was joined; auto: as the journal says, and another answer is a problem."""
    reembed: str | PathLike[str] | Mapping[str, object] | None
    """Of a partial backfill: the table of ids and true vectors that re-embedded rows came from."""
    trust_journal: bool
    """Open the source that the gallery's own journal names."""
    journal: str | PathLike[str] | None
    """Folder of the job's journal, where it was begun with one (--journal)."""
    expect_rows: int | None
    """Rows that the source had, by your own table."""
    deep: bool
    """Map every row again by the float64 reference."""
    progress: bool
    """Show a bar for a check that lasts more than two seconds."""
    transformation: TransformationLike | None
    """h; by default the copy in the gallery."""
    spot_check: int
    """Rows to map again by the float64 reference, within bounds calculated for the job's precision; 0: none."""
    seed: int
    """Of the choice of rows for the spot check."""


class BulkFilesKeywords(TypedDict, total=False):
    """What goes into the files of another database, and what it is called there."""

    id_column: str
    """Column of the ids; auto: id, _id, pk, key or uid, else the rows' numbers; '': those numbers."""
    vector_column: str
    """Column of the vectors; auto: the one that fct wrote, or one of a usual name."""
    columns: Sequence[str] | None
    """A payload column that goes along; may be repeated; by default all."""
    id_field: str
    """Milvus, pgvector: what the ids are called there."""
    vector_field: str
    """What the vectors are called there; auto: embedding for pgvector, else vector."""
    table: str
    """pgvector: the table in table.sql."""
    halfvec: bool
    """pgvector: vectors of float16."""
    progress: bool
    """Show a bar for an export that lasts more than two seconds."""


class TransformFileKeywords(StoreAccessKeywords, ColumnsKeywords, OutputKeywords, ExecutionKeywords, total=False):
    """What mapping rows needs to know."""


class JobKeywords(
    StoreAccessKeywords,
    ColumnsKeywords,
    OutputKeywords,
    ExecutionKeywords,
    PartialRowsKeywords,
    CutKeywords,
    DatabaseKeywords,
    total=False,
):
    """What a backfill's job is made of."""


class PlanKeywords(
    StoreAccessKeywords,
    ColumnsKeywords,
    OutputKeywords,
    ExecutionKeywords,
    PartialRowsKeywords,
    CutKeywords,
    DatabaseKeywords,
    GateKeywords,
    PredictionKeywords,
    total=False,
):
    """What :func:`fct.plan_backfill` takes."""


class BackfillKeywords(
    StoreAccessKeywords,
    ColumnsKeywords,
    OutputKeywords,
    ExecutionKeywords,
    PartialRowsKeywords,
    CutKeywords,
    DatabaseKeywords,
    GateKeywords,
    RunningKeywords,
    total=False,
):
    """What :func:`fct.backfill` takes."""


class VerifyKeywords(SpotCheckKeywords, StoreAccessKeywords, total=False):
    """What :func:`fct.verify_gallery` takes."""


class ExportKeywords(BulkFilesKeywords, StoreAccessKeywords, total=False):
    """What :func:`fct.gallery.export_bulk` takes."""
