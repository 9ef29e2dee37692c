"""Every option of the backfill, its checks and its prediction, in groups, and which function takes which groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Literal

from fct.checks import check_seed
from fct.options.code_options import code_number, code_ranges, number_or_name
from fct.options.declare import Flag, Group, OptionSet, option, optional
from fct.options.option_checks import (
    at_least,
    attempts,
    part,
    positive,
    reembedder,
    share,
    storage_options,
    table_or_mapping,
    text,
    whole,
)
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
    "BackfillOptions",
    "BulkFiles",
    "Columns",
    "Cut",
    "Database",
    "Execution",
    "ExportOptions",
    "Gate",
    "JobOptions",
    "Output",
    "PartialRows",
    "PlanOptions",
    "Prediction",
    "Running",
    "SpotCheck",
    "StoreAccess",
    "TransformFileOptions",
    "VerifyOptions",
    "storage_options",
]


_A_PATH = Flag(type=str | None)


@dataclass(frozen=True, kw_only=True)
class StoreAccess(Group):
    """How the stores behind paths and URLs are opened and waited for."""

    filesystem: FileSystem | None = option(
        None, "An fsspec or pyarrow filesystem that the paths are on; None for what a URL names.", flag=False
    )
    storage_options: StorageOptions | None = option(
        None,
        "For the store behind a URL, as fsspec names it, or the properties of an Iceberg catalog; may be repeated.",
        flag=Flag(name="--storage-option", type=list[str] | None, metavar="KEY=VALUE", parse=storage_options),
    )
    retries: int = option(6, "Further attempts, with back-off, where a store may have failed.", check=attempts)
    timeout: float = option(
        60.0,
        "Seconds to wait for a store's answer, and 1 more per MB moved.",
        check=positive("a positive number of seconds"),
    )


@dataclass(frozen=True, kw_only=True)
class Columns(Group):
    """Where in the old gallery the vectors, the side-information and the ids are, and how to read them."""

    side_source: GalleryLike | None = option(
        None,
        "Gallery of the side-information, where it is no column: its rows in the same order, unless side_join is id.",
        flag=_A_PATH,
    )
    side_join: Literal["position", "id"] = option(
        "position",
        "How side_source belongs to the source: row by row, or by their ids, through files on disk, in bounded memory.",
    )
    vector_column: str = option(
        "auto",
        "Column of the old vectors; auto: the only one, or the one named as docs/galleries.md says.",
        check=text("the name of a column"),
    )
    side_column: str = option(
        "auto", "Column of the side-information; auto: side, side_info, ...", check=text("the name of a column")
    )
    id_column: str = option(
        "auto", "Column of the ids, which rejects/ names; auto: id, _id, pk, key or uid.",
        check=text("the name of a column"),
    )  # fmt: skip
    old_model: str | None = option(
        None,
        "Id of the model that made the old vectors, where the gallery does not say it.",
        check=optional(text("the id of a model or None")),
    )
    binary_dtype: DType = option("float32", "What binary columns hold: float32 or float16.")
    scale: CodeNumber = option(
        1.0,
        "Old vectors are multiplied by this, the step of an 8-bit gallery: a number, an .npy file with one for each "
        "dimension, or a column with one for each row.",
        check=code_number(positive=True),
        flag=Flag(type=str | None, parse=number_or_name),
    )
    offset: CodeNumber = option(
        0.0,
        "Added after that, what a code of 0 stands for: a number, an .npy file or a column likewise.",
        check=code_number(positive=False),
        flag=Flag(type=str | None, parse=number_or_name),
    )
    code_ranges: CodeArray | None = option(
        None,
        "Instead of both, an .npy file (2, d): the lowest and the highest value of each dimension, which "
        "sentence-transformers cuts into int8 or uint8 codes.",
        check=code_ranges,
        flag=_A_PATH,
    )


@dataclass(frozen=True, kw_only=True)
class Output(Group):
    """What a new row looks like."""

    vector_format: Literal["auto"] | VectorFormat = option(
        "auto", "Parquet and Arrow: fixed_size_list, list or binary."
    )
    dtype: Literal["auto"] | DType = option("auto", "float32 or float16; auto: the source's.")
    keep_side_info: bool = option(False, "Keep the side-information column.")
    mixed: bool = option(
        False, "Write rows that will stand among re-embedded ones: of the length that was measured when h was fitted."
    )


@dataclass(frozen=True, kw_only=True)
class PartialRows(Group):
    """Which rows get the new model's own vectors instead of mapped ones, and where these come from."""

    reembed: str | PathLike[str] | Mapping[str, object] | Callable[..., object] | None = option(
        None,
        "True vectors for a part of the rows: a table or .npz of ids and vectors of the new model; from Python also a "
        "function from a list of ids to (n, d_new), None in the place of a vector that there is not.",
        check=reembedder,
        flag=_A_PATH,
    )
    budget: float | None = option(
        None, "Share of the rows to re-embed, from 0 to 1; by default all that a table has.", check=optional(part)
    )
    order: str = option(
        "random",
        "Which rows first: random; access (access_log); variance (1 - |h|^2, a diagnostic: measured no better than "
        "random); or a column of numbers, the highest first.",
        check=text("random, access, variance or the name of a column"),
    )
    access_log: GalleryLike | None = option(
        None, "For order access: a table of ids, and counts or a row for each access.", flag=_A_PATH
    )
    reembed_seed: int = option(0, "Of the choice by lot.", check=check_seed)
    reembed_ids: int = option(256, "Ids that the function is asked for at once.", check=whole(1), flag=False)
    reembed_payload: bool = option(
        False, "Call the function with (ids, rows), rows a pyarrow.RecordBatch of all their columns.", flag=False
    )
    true_column: str = option("reembedded", "Name of the column that says which rows are true.", check=text("a name"))


@dataclass(frozen=True, kw_only=True)
class Execution(Group):
    """What h runs on."""

    precision: Precision = option(
        "auto", "fp32, bf16, int8, on a GPU fp16 and fp8 besides, or auto: the fastest that h allows."
    )
    device: str = option("cpu", "cpu, cuda, cuda:1, ...", check=text("a name like 'cpu' or 'cuda:0'"))
    backend: str | None = option(
        None, "Force one: cpu, torch, triton, cuda, ref; it runs or says why not. triton, cuda: with --device cuda."
    )
    threads: int | None = option(None, "CPU threads; by default all.")


@dataclass(frozen=True, kw_only=True)
class Cut(Group):
    """The new gallery's files: their format, and how it is cut into shards."""

    format: Literal["auto"] | Format = option(
        "auto", "npy, bin, parquet, arrow, vortex, lance or delta; auto: the source's."
    )
    shard_rows: int | None = option(
        None, "Rows of a shard; by default as many as take about 128 MB.", check=optional(whole(1))
    )
    batch_rows: int | None = option(
        None,
        "Rows mapped at once; by default as many as take about 64 MB, float64 lists 16 MB.",
        check=optional(whole(1)),
    )


@dataclass(frozen=True, kw_only=True)
class Database(Group):
    """Where a job's journal lies, and what a database needs beside its address."""

    journal: str | PathLike[str] | None = option(
        None,
        "Folder of this machine for the journal: of a database, which has no place for files, or of a folder of "
        "parquet or arrow files in which nothing but these is to lie.",
        flag=_A_PATH,
    )
    max_rows_per_s: float | None = option(
        None, "Rows a second at most, so that a live database keeps answering.", check=optional(positive())
    )
    switch_alias: bool = option(False, "Point the collection's alias at the new one when all rows are there.")


@dataclass(frozen=True, kw_only=True)
class Gate(Group):
    """What retrieval quality a backfill must promise, on held-out pairs and on queries of your own."""

    pairs: str | PathLike[str] | Mapping[str, object] | None = option(
        None, "Held-out pairs, .npz with old, side, new and perhaps labels.", flag=_A_PATH
    )
    min_gap_closed: float | None = option(
        None, "Refuse (exit code 3) below this share of the mAP gap closed.", check=optional(share)
    )
    min_recall: float | None = option(
        None, "Refuse (exit code 3) below this recall@10 on the pairs.", check=optional(share)
    )
    queries: str | PathLike[str] | Mapping[str, object] | None = option(
        None,
        "Queries of your own, embedded by both models: a table or an .npz with id, old and new.",
        check=table_or_mapping("a mapping of id, old and new, or the path of a table"),
        flag=_A_PATH,
    )
    qrels: object = option(
        None,
        "What answers them: a file of TREC or BEIR, or a table with query, item and grade; items are ids of the "
        "source. No-go and inconclusive are refused (exit code 3).",
        check=table_or_mapping("a mapping of query, item and grade, fct.Judgements, or the path of a file"),
        flag=_A_PATH,
    )
    min_ndcg: float | None = option(
        None, "Refuse (exit code 3) below this nDCG@10 of the mapped rows on these queries.", check=optional(share)
    )
    min_query_recall: float | None = option(
        None, "Refuse (exit code 3) below this recall@10 of the relevant items.", check=optional(share)
    )
    ndcg_margin: float = option(
        0.0, "Loss of nDCG@10 against the old gallery, from 0 to 1, that you accept for other gains.", check=part
    )
    allow_inconclusive: bool = option(
        False, "Go on where the queries decide nothing: too few, or an interval with both a gain and a loss in it."
    )


@dataclass(frozen=True, kw_only=True)
class Prediction(Group):
    """What a plan measures, and what it is told for its prediction."""

    workers: int = option(1, "Machines like this one, for the prediction.", check=whole(1))
    price_per_hour: float | None = option(
        None, "What one machine costs, in your currency.", check=optional(at_least(0))
    )
    upload_mb_per_s: float | None = option(
        None,
        "10^6 bytes a second that one machine uploads; a plan cannot measure it.",
        check=optional(positive("a positive number of MB a second or None")),
    )
    price_per_million_embeddings: float | None = option(
        None, "What a million true vectors of a partial backfill cost.", check=optional(at_least(0))
    )
    embeddings_per_s: float | None = option(
        None,
        "True vectors a second that the new model gives, for the time of a partial backfill; a plan asks for none.",
        check=optional(positive("a positive number of vectors a second or None")),
    )
    sample_rows: int = option(4096, "Rows of the sample that is looked at.", check=whole(1))
    measure_seconds: float = option(
        1.0, "How long h is measured, and reading and writing together.", check=at_least(0)
    )  # fmt: skip
    expect_rows: int | None = option(
        None, "Rows that the source must have, from your own table: another number is refused.",
        check=optional(whole(0)),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Running(Group):
    """How a backfill runs, and when it stops."""

    max_rejects: int | None = option(
        None, "Stop once more rows than this were rejected; by default no limit.", check=optional(whole(0))
    )
    ray: str | None = option(
        None,
        "Run on Ray: auto, local, or a cluster's address.",
        check=optional(text("auto, local, a cluster's address or None")),
    )
    ray_cpus: int = option(1, "CPUs of each Ray worker.", check=whole(1))
    trust_sizes: bool = option(False, "On a restart, believe sizes without reading checksums.")
    expect_rows: int | None = option(
        None,
        "Rows that the source must have, from your own table: another number is refused before anything is written "
        "(with --follow: at the end).",
        check=optional(whole(0)),
    )
    follow: bool = option(
        False, "Map files that come while the gallery is read in a second pass, and so on until none is left."
    )
    progress: bool = option(True, "Show a progress bar.")


@dataclass(frozen=True, kw_only=True)
class SpotCheck(Group):
    """Against what a finished gallery is checked."""

    source: GalleryLike | None = option(
        None,
        "The old gallery: its rows are counted by another reader, ids and payload of all rows compared. Only what is "
        "named is opened.",
        flag=_A_PATH,
    )
    side_source: GalleryLike | None = option(
        None, "Gallery of the side-information, where it is no column of the source.", flag=_A_PATH
    )
    side_join: Literal["auto", "position", "id"] = option(
        "auto", "How it was joined; auto: as the journal says, and another answer is a problem."
    )
    reembed: str | PathLike[str] | Mapping[str, object] | None = option(
        None, "Of a partial backfill: the table of ids and true vectors that re-embedded rows came from.", flag=_A_PATH
    )
    trust_journal: bool = option(False, "Open the source that the gallery's own journal names.")
    journal: str | PathLike[str] | None = option(
        None,
        "Folder of the job's journal, where it was begun with one (--journal).",
        flag=_A_PATH,
    )
    expect_rows: int | None = option(None, "Rows that the source had, by your own table.", check=optional(whole(0)))
    deep: bool = option(False, "Map every row again by the float64 reference.")
    progress: bool = option(True, "Show a bar for a check that lasts more than two seconds.")
    transformation: TransformationLike | None = option(
        None, "h; by default the copy in the gallery.", flag=Flag(name="--transformation/-t", type=str | None)
    )
    spot_check: int = option(
        1024,
        "Rows to map again by the float64 reference, within bounds calculated for the job's precision; 0: none.",
        check=whole(0),
    )
    seed: int = option(0, "Of the choice of rows for the spot check.", check=check_seed)


@dataclass(frozen=True, kw_only=True)
class BulkFiles(Group):
    """What goes into the files of another database, and what it is called there."""

    id_column: str = option(
        "auto",
        "Column of the ids; auto: id, _id, pk, key or uid, else the rows' numbers; '': those numbers.",
        check=text("the name of a column"),
    )
    vector_column: str = option(
        "auto",
        "Column of the vectors; auto: the one that fct wrote, or one of a usual name.",
        check=text("the name of a column"),
    )
    columns: Sequence[str] | None = option(
        None,
        "A payload column that goes along; may be repeated; by default all.",
        flag=Flag(name="--column", type=list[str] | None, parse=lambda given: given or None),
    )
    id_field: str = option("id", "Milvus, pgvector: what the ids are called there.", check=text("a name"))
    vector_field: str = option(
        "auto", "What the vectors are called there; auto: embedding for pgvector, else vector.", check=text("a name")
    )
    table: str = option("items", "pgvector: the table in table.sql.", check=text("a name"))
    halfvec: bool = option(False, "pgvector: vectors of float16.")
    progress: bool = option(True, "Show a bar for an export that lasts more than two seconds.")


@dataclass(frozen=True, kw_only=True)
class TransformFileOptions(OptionSet):
    """What mapping rows needs to know."""

    access: StoreAccess = field(default_factory=StoreAccess)
    columns: Columns = field(default_factory=Columns)
    output: Output = field(default_factory=Output)
    execution: Execution = field(default_factory=Execution)


@dataclass(frozen=True, kw_only=True)
class JobOptions(TransformFileOptions):
    """What a backfill's job is made of."""

    partial: PartialRows = field(default_factory=PartialRows)
    cut: Cut = field(default_factory=Cut)
    database: Database = field(default_factory=Database)


@dataclass(frozen=True, kw_only=True)
class PlanOptions(JobOptions):
    """What :func:`fct.plan_backfill` takes."""

    gate: Gate = field(default_factory=Gate)
    prediction: Prediction = field(default_factory=Prediction)


@dataclass(frozen=True, kw_only=True)
class BackfillOptions(JobOptions):
    """What :func:`fct.backfill` takes."""

    gate: Gate = field(default_factory=Gate)
    running: Running = field(default_factory=Running)


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(OptionSet):
    """What :func:`fct.verify_gallery` takes."""

    spot: SpotCheck = field(default_factory=SpotCheck)
    access: StoreAccess = field(default_factory=StoreAccess)


@dataclass(frozen=True, kw_only=True)
class ExportOptions(OptionSet):
    """What :func:`fct.gallery.export_bulk` takes."""

    files: BulkFiles = field(default_factory=BulkFiles)
    access: StoreAccess = field(default_factory=StoreAccess)
