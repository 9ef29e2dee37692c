"""``fct plan``, ``fct backfill``, ``fct verify``, ``fct transform``, ``fct export``: old galleries to new ones."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from fct.cli.app import app, console

_Source = Annotated[str, typer.Argument(help="Old gallery: folder, glob, file, .lance dataset, or URL (s3://...).")]
_Destination = Annotated[str, typer.Argument(help="New gallery: a folder or a .lance dataset that need not exist.")]
_H = Annotated[str, typer.Option("--transformation", "-t", help="h, a .safetensors file.")]
_Side = Annotated[
    str | None, typer.Option(help="Gallery of the side-information, where it is no column: its rows in the same order.")
]
_Vector = Annotated[
    str, typer.Option(help="Column of the old vectors; auto: the only one, or the one named as docs/galleries.md says.")
]
_SideColumn = Annotated[str, typer.Option(help="Column of the side-information; auto: side, side_info, ...")]
_Id = Annotated[str, typer.Option(help="Column of the ids, which rejects/ names; auto: id, _id, pk, key or uid.")]
_OldModel = Annotated[
    str | None, typer.Option(help="Id of the model that made the old vectors, where the gallery does not say it.")
]
_Format = Annotated[str, typer.Option(help="npy, bin, parquet, arrow or lance; auto: the source's.")]
_VectorFormat = Annotated[str, typer.Option(help="Parquet and Arrow: fixed_size_list, list or binary.")]
_Dtype = Annotated[str, typer.Option(help="float32 or float16; auto: the source's.")]
_BinaryDtype = Annotated[str, typer.Option(help="What binary columns hold: float32 or float16.")]
_Scale = Annotated[float, typer.Option(help="Old vectors are multiplied by this: the step of an 8-bit gallery.")]
_Precision = Annotated[str, typer.Option(help="fp32, bf16, int8, or auto: the fastest that h allows.")]
_Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
_Backend = Annotated[
    str | None,
    typer.Option(
        help="Force one: cpu, torch, triton, cuda, ref; it runs or says why not. triton, cuda: with --device cuda."
    ),
]
_Threads = Annotated[int | None, typer.Option(help="CPU threads; by default all.")]
_Pairs = Annotated[str | None, typer.Option(help="Held-out pairs, .npz with old, side, new and perhaps labels.")]
_MinGap = Annotated[float | None, typer.Option(help="Refuse (exit code 3) below this share of the mAP gap closed.")]
_MinRecall = Annotated[float | None, typer.Option(help="Refuse (exit code 3) below this recall@10.")]
_ShardRows = Annotated[int | None, typer.Option(help="Rows of a shard; by default as many as take about 128 MB.")]
_BatchRows = Annotated[int | None, typer.Option(help="Rows mapped at once; by default as many as take about 64 MB.")]
_Retries = Annotated[int, typer.Option(help="Further attempts, with back-off, where a store may have failed.")]
_Timeout = Annotated[float, typer.Option(help="Seconds to wait for a store's answer, and 1 more per MB moved.")]
_KeepSide = Annotated[bool, typer.Option("--keep-side-info", help="Keep the side-information column.")]

_StorageOption = Annotated[
    list[str] | None,
    typer.Option(
        "--storage-option", metavar="KEY=VALUE", help="For the store behind a URL, as fsspec names it; may be repeated."
    ),
]


def storage_options(given: list[str] | None) -> dict[str, Any] | None:
    """``KEY=VALUE`` as fsspec takes them. VALUE is JSON where it can be read as such (true, 60, {...}), else a string.

    They may hold keys: no message repeats a value.
    """
    if not given:
        return None
    options: dict[str, Any] = {}
    for number, pair in enumerate(given, 1):
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ValueError(f"--storage-option: expected KEY=VALUE, got no {'=' if key else 'KEY'} in number {number}")
        if key in options:
            raise ValueError(f"--storage-option: expected each KEY once, got {key} twice")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


@app.command()
def plan(
    source: _Source,
    destination: _Destination,
    transformation: _H,
    side_source: _Side = None,
    vector_column: _Vector = "auto",
    side_column: _SideColumn = "auto",
    id_column: _Id = "auto",
    old_model: _OldModel = None,
    format: _Format = "auto",
    vector_format: _VectorFormat = "auto",
    dtype: _Dtype = "auto",
    binary_dtype: _BinaryDtype = "float32",
    scale: _Scale = 1.0,
    precision: _Precision = "auto",
    device: _Device = "cpu",
    backend: _Backend = None,
    threads: _Threads = None,
    pairs: _Pairs = None,
    min_gap_closed: _MinGap = None,
    min_recall: _MinRecall = None,
    shard_rows: _ShardRows = None,
    batch_rows: _BatchRows = None,
    keep_side_info: _KeepSide = False,
    workers: Annotated[int, typer.Option(help="Machines like this one, for the prediction.")] = 1,
    price_per_hour: Annotated[float | None, typer.Option(help="What one machine costs, in your currency.")] = None,
    upload_mb_per_s: Annotated[
        float | None, typer.Option(help="10^6 bytes a second that one machine uploads; a plan can not measure it.")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="A score threshold of the old space; the plan says which one of the new space answers to it."
        ),
    ] = None,
    storage_option: _StorageOption = None,
    retries: _Retries = 6,
    timeout: _Timeout = 60.0,
) -> None:
    """Say what a backfill would do, how long it takes and what it would refuse. The destination is not touched.

    Example: fct plan gallery/ new-gallery/ -t h.safetensors --old-model mobile-1 --price-per-hour 2.5
    """
    from fct.backfilling.plan import plan_backfill

    found = plan_backfill(
        source,
        destination,
        transformation,
        side_source=side_source,
        vector_column=vector_column,
        side_column=side_column,
        id_column=id_column,
        old_model=old_model,
        format=format,
        vector_format=vector_format,
        dtype=dtype,
        binary_dtype=binary_dtype,
        scale=scale,
        precision=precision,
        device=device,
        backend=backend,
        threads=threads,
        pairs=pairs,
        min_gap_closed=min_gap_closed,
        min_recall=min_recall,
        shard_rows=shard_rows,
        batch_rows=batch_rows,
        keep_side_info=keep_side_info,
        workers=workers,
        price_per_hour=price_per_hour,
        upload_mb_per_s=upload_mb_per_s,
        storage_options=storage_options(storage_option),
        retries=retries,
        timeout=timeout,
    )
    _show_plan(found, threshold)
    if found.gate_refusals:
        raise typer.Exit(3)
    if found.refusals:
        raise typer.Exit(1)


def _show_plan(found: Any, threshold: float | None) -> None:
    from rich.table import Table

    if found.job is not None:
        free = "" if found.free_bytes is None else f", {found.free_bytes / 1e9:,.1f} GB free"
        console.print(f"{found.rows:,} rows in {_shards(found.shards)}: {found.source} -> {found.destination}")
        console.print(f"{_size(found.bytes_in)} in, {_size(found.bytes_out)} of vectors out{free}")
        console.print(
            f"{found.rows_per_second:,.0f} rows/s expected here ({found.backend}, {found.precision}; {found.binds} "
            f"binds): {_duration(found.seconds)} on {found.workers} such machine{'s' if found.workers > 1 else ''}",
            soft_wrap=True,
        )
        alone = {"h": found.h_rows_per_second}
        alone |= {"reading": found.read_rows_per_second} if found.read_rows_per_second else {}
        alone |= {"writing": found.write_rows_per_second} if found.write_rows_per_second else {}
        console.print("measured alone: " + ", ".join(f"{what} {rate:,.0f} rows/s" for what, rate in alone.items()))
        if found.upload_rows_per_second is not None:
            console.print(
                f"uploading {found.upload_rows_per_second:,.0f} rows/s at the {found.upload_mb_per_s:g} MB/s you stated"
            )
        if found.upload_left_out:
            console.print(
                "The upload is not in these figures, since a plan writes nothing there: state its rate with "
                "--upload-mb-per-s.",
                soft_wrap=True,
            )
        if found.cost_per_billion_rows is not None:
            console.print(f"{found.cost_per_billion_rows:,.2f} per billion rows at {found.price_per_hour:g} an hour")
        if found.sample_rows:
            console.print(f"sample of {found.sample_rows:,} rows: {found.nonfinite_share:.2%} would go to rejects/")
        for reason, count in found.reject_reasons.items():
            console.print(f"  {count} x {reason}")
    if found.quality is not None:
        closed = found.quality.gap_closed
        console.print(
            f"quality on {found.quality.pairs} pairs: recall@10 {found.quality.recall_at_10:.3f}"
            + ("" if closed is None else f", {closed:.3f} of the mAP gap closed")
        )
    if found.scores is not None:
        table = Table("quantile", f"old score ({found.scores.metric_old})", f"new score ({found.scores.metric_new})")
        for q, a, b in zip(found.scores.quantiles, found.scores.old, found.scores.new, strict=True):
            table.add_row(f"{q:g}", f"{a:.4g}", f"{b:.4g}")
        console.print("Score thresholds move with the space. Scores of a row's nearest other row in the sample:")
        console.print(table)
        if threshold is not None:
            low, high = found.scores.old[0], found.scores.old[-1]
            if low <= threshold <= high:
                console.print(
                    f"an old threshold of {threshold:g} maps to about {found.scores.threshold(threshold):.4g}"
                )
            else:
                console.print(f"an old threshold of {threshold:g} is outside these old scores and can not be mapped")
    for why in found.refusals:
        console.say("refused:", why, "bold red")


def _shards(count: int) -> str:
    return f"{count:,} {'shard' if count == 1 else 'shards'}"


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


@app.command()
def backfill(
    source: _Source,
    destination: _Destination,
    transformation: _H,
    side_source: _Side = None,
    vector_column: _Vector = "auto",
    side_column: _SideColumn = "auto",
    id_column: _Id = "auto",
    old_model: _OldModel = None,
    format: _Format = "auto",
    vector_format: _VectorFormat = "auto",
    dtype: _Dtype = "auto",
    binary_dtype: _BinaryDtype = "float32",
    scale: _Scale = 1.0,
    precision: _Precision = "auto",
    device: _Device = "cpu",
    backend: _Backend = None,
    threads: _Threads = None,
    pairs: _Pairs = None,
    min_gap_closed: _MinGap = None,
    min_recall: _MinRecall = None,
    shard_rows: _ShardRows = None,
    batch_rows: _BatchRows = None,
    keep_side_info: _KeepSide = False,
    max_rejects: Annotated[int | None, typer.Option(help="Stop once more rows than this were rejected.")] = None,
    ray: Annotated[str | None, typer.Option(help="Run on Ray: auto, local, or a cluster's address.")] = None,
    ray_cpus: Annotated[int, typer.Option(help="CPUs of each Ray worker.")] = 1,
    storage_option: _StorageOption = None,
    retries: _Retries = 6,
    timeout: _Timeout = 60.0,
    trust_sizes: Annotated[
        bool, typer.Option("--trust-sizes", help="On a restart, believe sizes without reading checksums.")
    ] = False,
    faiss: Annotated[
        str | None, typer.Option(help="Build a FAISS index of the new gallery: Flat, IVF4096,PQ32.")
    ] = None,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Map every row of a gallery. Stop and start at will; nothing is done twice and nothing is lost.

    Exit code 0: done; 3: refused by the quality gate; 4: done, with rows in rejects/.

    Example: fct backfill gallery/ new-gallery/ -t h.safetensors --old-model mobile-1
    """
    from fct.backfilling.job import QualityGateError
    from fct.backfilling.run import backfill as run

    if faiss is not None:
        from fct.artifact.transformation import Transformation
        from fct.gallery.faiss_index import build_faiss, check_faiss

        check_faiss(destination, faiss, Transformation.load(transformation).new_space)
    try:
        report = run(
            source,
            destination,
            transformation,
            side_source=side_source,
            vector_column=vector_column,
            side_column=side_column,
            id_column=id_column,
            old_model=old_model,
            format=format,
            vector_format=vector_format,
            dtype=dtype,
            binary_dtype=binary_dtype,
            scale=scale,
            precision=precision,
            device=device,
            backend=backend,
            threads=threads,
            pairs=pairs,
            min_gap_closed=min_gap_closed,
            min_recall=min_recall,
            shard_rows=shard_rows,
            batch_rows=batch_rows,
            keep_side_info=keep_side_info,
            max_rejects=max_rejects,
            ray=ray,
            ray_cpus=ray_cpus,
            storage_options=storage_options(storage_option),
            retries=retries,
            timeout=timeout,
            trust_sizes=trust_sizes,
            progress=progress,
        )
    except QualityGateError as error:
        console.say("refused:", str(error), "bold red")
        raise typer.Exit(3) from None
    console.print(
        f"{report.rows_in:,} rows in = {report.rows_out:,} out + {report.rejects:,} rejected; "
        f"{_shards(report.shards_done)} done, {report.shards_kept} kept, {report.rows_per_second:,.0f} rows/s "
        f"({report.backend}, {report.precision})",
        soft_wrap=True,
    )
    if faiss is not None:
        console.print(f"index: {build_faiss(destination, faiss)}")
    if report.rejects:
        console.print(f"rejected rows: {report.rejects_folder}")
        raise typer.Exit(4)


@app.command()
def verify(
    gallery: Annotated[str, typer.Argument(help="A backfill's destination.")],
    source: Annotated[str | None, typer.Option(help="The old gallery, where it has been moved.")] = None,
    side_source: _Side = None,
    transformation: Annotated[
        str | None, typer.Option("--transformation", "-t", help="h; by default the copy in the gallery.")
    ] = None,
    spot_check: Annotated[int, typer.Option(help="Rows to map again by the float64 reference.")] = 256,
    storage_option: _StorageOption = None,
    retries: _Retries = 6,
    timeout: _Timeout = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a new gallery: every row there once, checksums, spaces, spot checks. Exit code 1 on any problem.

    Example: fct verify new-gallery/
    """
    from dataclasses import asdict

    from fct.backfilling.verify import verify_gallery

    report = verify_gallery(
        gallery,
        source=source,
        side_source=side_source,
        transformation=transformation,
        spot_check=spot_check,
        storage_options=storage_options(storage_option),
        retries=retries,
        timeout=timeout,
    )
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=1))
    else:
        console.print(
            f"{report.rows_in:,} rows in = {report.rows_out:,} out + {report.rejects:,} rejected, "
            f"{_shards(report.shards)}, {report.bytes:,} bytes"
        )
        if report.spot_check_skipped:
            console.print(f"no spot check: {report.spot_check_skipped}", soft_wrap=True)
        else:
            console.print(f"{report.spot_checked} rows against the reference: worst error {report.worst_error:.2g}")
        for problem in report.problems:
            console.say("problem:", problem, "bold red")
        console.print("ok" if report.ok else f"{len(report.problems)} problems")
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def transform(
    old: Annotated[str, typer.Argument(help="Old vectors: a file of any format that backfill reads, or its URL.")],
    out: Annotated[str, typer.Argument(help="New vectors, .npy, .fbin, .parquet or .arrow, on this machine.")],
    transformation: _H,
    side_source: _Side = None,
    vector_column: _Vector = "auto",
    side_column: _SideColumn = "auto",
    old_model: _OldModel = None,
    vector_format: _VectorFormat = "auto",
    dtype: _Dtype = "auto",
    binary_dtype: _BinaryDtype = "float32",
    scale: _Scale = 1.0,
    precision: _Precision = "auto",
    device: _Device = "cpu",
    backend: _Backend = None,
    threads: _Threads = None,
    keep_side_info: _KeepSide = False,
    storage_option: _StorageOption = None,
    retries: _Retries = 6,
    timeout: _Timeout = 60.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
) -> None:
    """Map one file to one file, in one go; a bad row stops it. For more than a few gigabytes use backfill.

    Example: fct transform old.npy new.npy --side-source side.npy -t h.safetensors --old-model mobile-1
    """
    from fct.backfilling.single import transform_file

    rows = transform_file(
        old,
        out,
        transformation,
        side_source=side_source,
        vector_column=vector_column,
        side_column=side_column,
        old_model=old_model,
        vector_format=vector_format,
        dtype=dtype,
        binary_dtype=binary_dtype,
        scale=scale,
        precision=precision,
        device=device,
        backend=backend,
        threads=threads,
        keep_side_info=keep_side_info,
        storage_options=storage_options(storage_option),
        retries=retries,
        timeout=timeout,
        overwrite=overwrite,
    )
    console.print(f"{rows:,} rows -> {out}", soft_wrap=True)
