"""Against S3's and Google Cloud Storage's API servers on loopback; S3's answers 500 for a while."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest

import fct
from fct.errors import StoreError
from fct.gallery.location import location_of, with_retries
from tests.backfilling.conftest import QUICK, contents
from tests.command_line import run_here

pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    host, port = server.get_host_and_port()
    options = {"endpoint_url": f"http://{host}:{port}", "skip_instance_cache": True}
    urllib.request.urlopen(f"{options['endpoint_url']}/moto-api/reset", b"")  # all servers of a process share buckets
    location_of("s3://bucket/x", storage_options=options).fs.makedirs("bucket", exist_ok=True)
    yield options
    server.stop()


def test_from_and_to_s3(
    gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path, store: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source = gallery(1500, bad=(3,))
    fs = location_of("s3://bucket/x", storage_options=store).fs
    fs.put(str(source) + "/", "bucket/old/", recursive=True)
    options = {**QUICK, "shard_rows": 800, "batch_rows": 400, "storage_options": store}
    plan = fct.plan_backfill("s3://bucket/old", "s3://bucket/new", h, measure_seconds=0.01, storage_options=store)
    assert (plan.rows, plan.free_bytes, plan.refusals) == (1500, None, ())
    # The store answers every third upload with an error for a while.
    put, calls = type(fs).put_file, []

    def flaky(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) % 3 == 1:
            raise OSError("503 SlowDown: please reduce your request rate")
        return put(self, *args, **kwargs)

    monkeypatch.setattr(type(fs), "put_file", flaky)
    report = fct.backfill("s3://bucket/old", "s3://bucket/new", h, **options)
    assert (report.rows_out, report.rejects) == (1499, 1)
    assert fct.verify_gallery("s3://bucket/new", storage_options=store).ok
    fs.rm("bucket/new/_fct/done/00000001.json")
    assert fct.backfill("s3://bucket/old", "s3://bucket/new", h, **options).shards_done == 1
    fs.get("bucket/new/", str(tmp_path / "got") + "/", recursive=True)
    fct.backfill(source, tmp_path / "plain", h, progress=False, shard_rows=800, batch_rows=400)
    got, want = contents(tmp_path / "got"), contents(tmp_path / "plain")
    assert {k: v for k, v in got.items() if "done" not in k} == {k: v for k, v in want.items() if "done" not in k}


@pytest.mark.parametrize("kind", ["delta", "iceberg"])
def test_tables_on_s3_are_committed_once(
    kind: str, gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path, store: dict[str, Any]
) -> None:
    pytest.importorskip("deltalake" if kind == "delta" else "pyiceberg.catalog.sql", exc_type=ImportError)
    lake = {
        "type": "sql", "uri": f"sqlite:///{tmp_path}/catalog.db", "warehouse": "s3://bucket/lake",
        "s3.endpoint": store["endpoint_url"], "s3.access-key-id": "test", "s3.secret-access-key": "test",
        "s3.region": "us-east-1",
    }  # fmt: skip
    to, where, options = {
        "delta": ("delta://s3://bucket/table", "s3://bucket/table", store),
        "iceberg": ("iceberg://prod/shop.items", "s3://bucket/lake/shop/items", lake),
    }[kind]
    source = gallery(1500, bad=(3,))
    for done in (5, 0):
        report = fct.backfill(source, to, h, progress=False, storage_options=options)
        assert (report.rows_out, report.shards_done > 0) == (1499, done > 0)
    there = {**store, "client_kwargs": {"region_name": "us-east-1"}}  # pyiceberg asks Amazon for it otherwise
    checked = fct.verify_gallery(where, source=source, storage_options=there)
    assert (checked.problems, checked.compared) == ((), 1499)


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An emulator of Google Cloud Storage with an empty bucket; its URL."""
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks for the kind of bucket by gRPC
    pytest.importorskip("gcsfs")
    create_server = pytest.importorskip("gcp_storage_emulator.server").create_server
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


def test_from_and_to_gs(gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path, google: str) -> None:
    source = gallery(1500, bad=(3,))
    options = {"endpoint_url": google, "token": "anon", "project": "p", "skip_instance_cache": True}
    fs = location_of("gs://bucket/x", storage_options=options).fs
    fs.put(str(source) + "/", "bucket/old/", recursive=True)
    old, new = "gs://bucket/old", "gs://bucket/new"
    access: dict[str, Any] = {"storage_options": options}
    how: dict[str, Any] = {"progress": False, "shard_rows": 800, "batch_rows": 400}
    report = fct.backfill(old, new, h, **access, **how)
    assert (report.rows_out, report.rejects) == (1499, 1)
    verified = fct.verify_gallery(new, source=old, **access)
    assert verified.ok, verified.problems
    assert verified.spot_checked > 200
    fs.rm("bucket/new/_fct/done/00000001.json")
    assert fct.backfill(old, new, h, **access, **how).shards_done == 1
    fs.invalidate_cache()
    fs.get("bucket/new/", str(tmp_path / "got") + "/", recursive=True)
    fct.backfill(source, tmp_path / "plain", h, **how)
    got, want = (
        {k: v for k, v in contents(tmp_path / x).items() if not k.startswith("_fct/done")} for x in ("got", "plain")
    )
    assert got == want


SECRET = "sekrit-98765"


def without_keys() -> dict[str, str]:
    """An environment that knows no keys."""
    return {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}


def commands(store: dict[str, Any], *more: str) -> Callable[..., tuple[int, str]]:
    """Runs ``fct`` with this store's options on its command line: (exit code, all it says)."""
    given = [f"endpoint_url={store['endpoint_url']}", "key=AKIDTEST", f"secret={SECRET}", "skip_instance_cache=true"]
    given += ['client_kwargs={"region_name": "us-east-1"}', *more]

    def run(*arguments: object, options: bool = True) -> tuple[int, str]:
        more = [word for pair in given for word in ("--storage-option", pair)] if options else []
        fsspec.filesystem("s3").clear_instance_cache()  # one of another test knows its keys
        code, out, err = run_here(*arguments, *more, environment=without_keys())
        return code, " ".join((out + err).split())

    return run


def test_the_command_line_takes_storage_options_and_keeps_them_to_itself(
    gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path, store: dict[str, Any]
) -> None:
    source, path, run = gallery(1500), tmp_path / "h.safetensors", commands(store)
    h.save(path)
    fs = location_of("s3://bucket/x", storage_options=store).fs
    fs.put(str(source) + "/", "bucket/old/", recursive=True)
    old, new = "s3://bucket/old", "s3://bucket/new"
    job = (old, new, "-t", path, "--shard-rows", 800)
    said = [
        run("plan", *job),
        run("backfill", *job, "--no-progress", "--debug"),
        run("verify", new, "--source", old),
        run("transform", old + "/part-2.parquet", tmp_path / "one.parquet", "-t", path),
        run("export", new, tmp_path / "export", "--to", "milvus"),
    ]
    assert [code for code, _ in said] == [0] * 5, said
    assert "2 shards done, 0 kept" in said[1][1]
    assert "1,024 rows against the reference" in said[2][1]
    assert pq.read_metadata(tmp_path / "one.parquet").num_rows == 757
    assert sum(pq.read_metadata(f).num_rows for f in (tmp_path / "export").glob("*.parquet")) == 1500
    # They are no part of the job: with another key the same backfill goes on.
    fs.rm("bucket/new/_fct/done/00000001.json")
    code, words = run("backfill", *job, "--no-progress", "--storage-option", "token=another")
    assert (code, "1 shard done, 1 kept" in words) == (0, True), words
    code, words = run("verify", new, options=False)  # without them there are no keys
    assert (code, "redentials" in words) == (1, True), words
    wrong = [
        (("--storage-option", f"nonsense={SECRET}"), "storage_options: expected what s3://bucket/"),
        (("--storage-option", SECRET), "--storage-option: expected KEY=VALUE, got no = in number 1"),
        (("--storage-option", f"={SECRET}"), "--storage-option: expected KEY=VALUE, got no KEY in number 1"),
        (("--storage-option", f"key={SECRET}"), "--storage-option: expected each KEY once, got key twice"),
    ]
    said += [run("verify", new, *words) for words, _ in wrong]
    assert [(code, message in text) for (code, text), (_, message) in zip(said[5:], wrong, strict=True)] == [
        (1, True)
    ] * 4, said[5:]
    assert not [text for _, text in said if SECRET in text or "AKIDTEST" in text]
    kept = {name: fs.cat_file(name) for name in fs.find("bucket/new")}
    assert {"bucket/new/_fct/job.json", "bucket/new/_fct/manifest.json"} <= kept.keys()
    kept |= {str(f): f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    assert not [name for name, data in kept.items() if SECRET.encode() in data or b"AKIDTEST" in data]


def test_lance_on_a_store_takes_the_same_options(
    gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path, store: dict[str, Any]
) -> None:
    pytest.importorskip("lance")
    source, path, run = gallery(1500), tmp_path / "h.safetensors", commands(store)
    h.save(path)
    code, words = run("backfill", source, "s3://bucket/new.lance", "-t", path, "--no-progress")
    assert (code, "1,500 rows in = 1,500 out" in words) == (0, True), words
    code, words = run("verify", "s3://bucket/new.lance", "--source", source)
    assert (code, words.endswith("ok")) == (0, True), words
    fs = location_of("s3://bucket/x", storage_options=store).fs
    assert not [name for name in fs.find("bucket") if SECRET.encode() in fs.cat_file(name)]


@pytest.mark.slow
def test_ray_workers_get_the_options_and_no_log_does(
    gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path, store: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("ray")
    source, path = gallery(1500), tmp_path / "h.safetensors"
    h.save(path)
    logs = Path(tempfile.mkdtemp(dir="/tmp"))  # Ray's sockets lie there: their paths must be short
    monkeypatch.setenv("RAY_TMPDIR", str(logs))
    location_of("s3://bucket/x", storage_options=store).fs.put(str(source) + "/", "bucket/old/", recursive=True)
    try:
        code, words = commands(store)(
            "backfill", "s3://bucket/old", "s3://bucket/new", "-t", path, "--shard-rows", 800, "--no-progress",
            "--ray", "local",
        )  # fmt: skip
        assert (code, "1,500 rows in = 1,500 out" in words) == (0, True), words
        found = [f for f in logs.rglob("*") if f.is_file()]
        assert [f for f in found if f.suffix in (".log", ".out", ".err")]
        assert not [f for f in found if SECRET.encode() in f.read_bytes()]
    finally:
        shutil.rmtree(logs, ignore_errors=True)


def test_a_lock_on_a_store_names_its_holder(h: fct.Transformation, store: dict[str, Any]) -> None:
    from fct.backfilling.journal import Journal
    from fct.errors import InUseError

    place = location_of("s3://bucket/new", storage_options=store)
    import time

    (place / "_fct/lock").write_bytes(json.dumps({"who": "process 1 on far", "time": time.time()}).encode())
    with pytest.raises(InUseError, match="process 1 on far"), Journal(place / "_fct", place).lock():
        pass
    (place / "_fct/lock").write_bytes(json.dumps({"who": "process 1 on far", "time": time.time() - 99}).encode())
    with Journal(place / "_fct", place).lock():
        pass


def test_retries_end_and_final_errors_are_not_retried() -> None:
    calls: list[int] = []

    def retry(error: Exception) -> None:
        def fail() -> None:
            calls.append(1)
            raise error

        with_retries(fail, "x", retries=2, first_wait=0.001)

    with pytest.raises(StoreError, match=r"x: reset \(tried 3 times\)"):
        retry(OSError("reset"))
    assert len(calls) == 3

    with pytest.raises(FileNotFoundError):
        retry(FileNotFoundError("gone"))
    assert len(calls) == 4

    class NoCredentialsError(Exception):
        """As botocore calls it."""

    with pytest.raises(StoreError, match=r"x: none found; its keys are read from"):
        retry(NoCredentialsError("none found"))
    assert len(calls) == 5
