"""Against S3's and Google Cloud Storage's API servers on loopback; S3's answers 500 for a while."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fct
from fct.gallery.location import StoreError, location_of, with_retries
from tests.backfilling.conftest import QUICK, contents

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
    old, new, access = "gs://bucket/old", "gs://bucket/new", {"storage_options": options}
    how: dict[str, Any] = {"progress": False, "shard_rows": 800, "batch_rows": 400}
    report = fct.backfill(old, new, h, **access, **how)
    assert (report.rows_out, report.rejects) == (1499, 1)
    verified = fct.verify_gallery(new, **access)
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


def test_a_lock_on_a_store_names_its_holder(h: fct.Transformation, store: dict[str, Any]) -> None:
    from fct.backfilling.job import InUseError, Journal

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

    def failing() -> None:
        calls.append(1)
        raise OSError("reset")

    with pytest.raises(StoreError, match=r"x: reset \(tried 3 times\)"):
        with_retries(failing, "x", retries=2, first_wait=0.001)
    assert len(calls) == 3

    def missing() -> None:
        calls.append(1)
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError):
        with_retries(missing, "x", retries=2, first_wait=0.001)
    assert len(calls) == 4
