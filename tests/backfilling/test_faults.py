"""What breaks around a backfill: a full disk, lost permissions, a store that fails for a while or for good."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import fct
from fct.backfilling.single import transform_file
from fct.errors import BackfillError
from fct.gallery.interfaces import Piece, Source
from tests.backfilling.conftest import D_NEW, D_OLD, QUICK, contents

Make = Callable[..., Path]


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[], None]]:
    """``folder`` on a disk of 128 KB where mounting is allowed, else files limited to 4 KB; yields what makes room."""
    folder.mkdir()
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(folder)], capture_output=True, check=False
    ).returncode
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def make_room() -> None:
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield make_room
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_and_resumed_from(gallery: Make, h: fct.Transformation, tmp_path: Path) -> None:
    source = gallery()
    fct.backfill(source, tmp_path / "plain", h, **QUICK)
    with small_disk(tmp_path / "disk") as make_room:
        new = tmp_path / "disk" / "new"
        # Not tried again and again: a full disk does not empty itself.
        with pytest.raises(BackfillError, match=r"(No space left|File too large).*what is done is kept"):
            fct.backfill(source, new, h, **QUICK)
        done = len(list((new / "_fct/done").glob("[0-9]*.json")))
        assert done < 10
        make_room()
        report = fct.backfill(source, new, h, **QUICK)
        assert report.shards_kept == done
        assert contents(new) == contents(tmp_path / "plain")
        assert fct.verify_gallery(new).ok


_CHILD = """
import os, sys, threading, time
from pathlib import Path
import fct
source, new, path, other = sys.argv[1:]
options = {"progress": False, "shard_rows": 300, "batch_rows": 64, "threads": 1}
fct.backfill(source, other, path, **options)  # everything is imported while files of Python's own can still be read
done = Path(new) / "_fct/done"

def take_away():
    while not done.is_dir() or len(list(done.glob("[0-9]*.json"))) < 2:
        time.sleep(0.001)
    os.chmod(new, 0o500)

if os.geteuid() == 0:  # root may write anywhere
    os.seteuid(65534)
threading.Thread(target=take_away, daemon=True).start()
try:
    fct.backfill(source, new, path, **options)
except fct.backfilling.job.BackfillError as error:
    print(error)
    sys.exit(7)
"""


def test_a_lost_permission_is_named_and_resumed_from(gallery: Make, h: fct.Transformation) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        source = gallery(20000)
        source = source.rename(folder / "old")
        h.save(folder / "h.safetensors")
        os.chmod(folder / "h.safetensors", 0o644)
        arguments = [str(source), str(folder / "new"), str(folder / "h.safetensors"), str(folder / "plain")]
        child = subprocess.run(
            [sys.executable, "-c", _CHILD, *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        assert child.returncode == 7, child.stderr
        assert "Permission denied" in child.stdout
        assert "what is done is kept, start again once this is put right" in child.stdout
        (folder / "new").chmod(0o700)
        report = fct.backfill(source, folder / "new", h, progress=False, threads=1)
        assert 2 <= report.shards_kept < report.shards
        assert contents(folder / "new") == contents(folder / "plain")


class Unwell:
    """A WSGI application in front of a store's: answers with errors, or late, when told to."""

    def __init__(self, store: Any) -> None:
        self.store, self.lock = store, threading.Lock()
        self.requests = self.failed = 0
        self.ended = threading.Event()
        self.mode: Callable[[int], str] = lambda request: "well"

    def __call__(self, environ: dict[str, Any], start: Any) -> Any:
        with self.lock:
            self.requests += 1
            how = self.mode(self.requests)
            self.failed += how != "well"
        if how == "late":
            threading.Event().wait(1.2)  # longer than the client waits
        if how == "never" or (how == "takes nothing" and environ["REQUEST_METHOD"] == "PUT"):
            self.ended.wait()
            raise ConnectionAbortedError
        if how in ("500", "503"):
            length = int(environ.get("CONTENT_LENGTH") or 0)
            environ["wsgi.input"].read(length)
            code = {"500": "InternalError", "503": "SlowDown"}[how]
            body = f"<Error><Code>{code}</Code><Message>the store is unwell</Message></Error>".encode()
            start(f"{how} {code}", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]
        return self.store(environ, start)


@pytest.fixture
def unwell(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Unwell, dict[str, Any]]]:
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server")
    from werkzeug.serving import make_server

    application = Unwell(server.DomainDispatcherApplication(server.create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    options = {
        "endpoint_url": f"http://127.0.0.1:{server.port}",
        "skip_instance_cache": True,
        "config_kwargs": {"read_timeout": 0.5, "retries": {"max_attempts": 1}},
    }
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # ours are tested, not its
    from moto.moto_api._internal.models import moto_api_backend

    moto_api_backend.reset()  # what another test left in the same process
    s3fs.S3FileSystem(**options).makedirs("unwell", exist_ok=True)
    yield application, options
    application.ended.set()
    server.shutdown()
    thread.join()


@pytest.mark.slow
def test_a_store_that_fails_for_a_while(
    gallery: Make, h: fct.Transformation, tmp_path: Path, unwell: tuple[Unwell, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import s3fs

    application, options = unwell
    source = gallery(1500, bad=(3,))
    s3fs.S3FileSystem(**options).put(str(source) + "/", "unwell/old/", recursive=True)
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    asked = application.requests

    def mode(request: int) -> str:
        """From the fortieth request on, three bad ones of six: errors and a time-out; then well again."""
        return (
            ["500", "503", "well", "late", "well", "well"][request % 6] if asked + 40 < request < asked + 64 else "well"
        )

    application.mode = mode
    how = {**QUICK, "shard_rows": 400, "batch_rows": 200}
    report = fct.backfill("s3://unwell/old", "s3://unwell/new", h, storage_options=options, **how)
    assert application.failed >= 6
    assert waits
    assert (report.rows_out, report.rejects) == (1499, 1)
    s3fs.S3FileSystem(**options).get("unwell/new/", str(tmp_path / "got") + "/", recursive=True)
    fct.backfill(source, tmp_path / "plain", h, **how)
    got, want = (
        {k: v for k, v in contents(tmp_path / x).items() if not k.startswith("_fct/done")} for x in ("got", "plain")
    )
    assert got == want


def test_a_store_that_fails_for_good(
    gallery: Make, h: fct.Transformation, unwell: tuple[Unwell, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    import fct.gallery.location as location

    application, options = unwell
    source = gallery(1500)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    publish = location.Location.publish

    def ill(self: location.Location, part: Path) -> None:
        if part.name.startswith("part-00000002"):
            application.mode = lambda request: "503"
        publish(self, part)

    monkeypatch.setattr(location.Location, "publish", ill)
    with pytest.raises(BackfillError, match=r"destination: writing to s3://unwell/new failed.*start again"):
        fct.backfill(source, "s3://unwell/new", h, retries=1, storage_options=options, **QUICK)
    monkeypatch.setattr(location.Location, "publish", publish)
    application.mode = lambda request: "well"
    report = fct.backfill(source, "s3://unwell/new", h, storage_options=options, **QUICK)
    assert report.shards_kept >= 2
    assert report.rows_out == 1500
    assert fct.verify_gallery("s3://unwell/new", storage_options=options).ok


@pytest.mark.grid(3)
@pytest.mark.parametrize("when", ["opening", "reading", "writing"])
def test_a_store_that_never_answers(
    when: str, gallery: Make, h: fct.Transformation, unwell: tuple[Unwell, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """It takes every request and is silent; the client itself would wait for minutes."""
    import s3fs

    from fct.errors import StoreError
    from fct.gallery.location import Location
    from fct.gallery.parquet_files import ParquetSource

    application, options = unwell
    options = {k: v for k, v in options.items() if k != "config_kwargs"}
    source = gallery(1500)
    s3fs.S3FileSystem(**options).put(str(source) + "/", "unwell/old/", recursive=True)
    how = {**QUICK, "storage_options": options}

    def hang(method: Any, at: int) -> Any:
        calls: list[int] = []

        def hanging(self: Any, *arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == at:
                application.mode = lambda request: "never" if when == "reading" else "takes nothing"
            return method(self, *arguments)

        return hanging

    if when == "opening":
        application.mode = lambda request: "never"
    elif when == "reading":
        monkeypatch.setattr(
            ParquetSource, "read_file", hang(ParquetSource.read_file, 7)
        )  # twice for the sample, and for the first shard
    else:
        monkeypatch.setattr(Location, "publish", hang(Location.publish, 3))
    start = time.perf_counter()
    with pytest.raises(
        (BackfillError, StoreError), match=r"s3://unwell/.*no answer within [01]\.\d+ s \(tried twice\)"
    ) as info:
        fct.backfill("s3://unwell/old", "s3://unwell/new", h, retries=1, timeout=1.2, **how)
    assert time.perf_counter() - start < 20
    assert (when == "writing") == ("what is done is kept, start again" in str(info.value))
    assert when != "opening" or "looking at s3://unwell/old" in str(info.value)
    application.mode = lambda request: "well"
    report = fct.backfill("s3://unwell/old", "s3://unwell/new", h, **how)
    assert (report.rows_out, report.shards_kept > 0) == (1500, when != "opening")
    assert fct.verify_gallery("s3://unwell/new", storage_options=options).ok


class Silent(Source):
    """A store that can be opened and never answers a read; counts how often it was asked."""

    kind, url, schema, transient = "silent", "silent:old", pa.schema({"vector": pa.list_(pa.float32(), D_OLD)}), True
    space = fct.EmbeddingSpace("random-old", D_OLD)

    def __init__(self) -> None:
        self.asked = 0

    def pieces(self) -> list[Piece]:
        return [Piece("all", 100, 0, "")]

    def read(self, piece: Piece, start: int, rows: int, batch_rows: int) -> Iterator[pa.RecordBatch]:
        self.asked += 1
        raise ConnectionError("no answer")
        yield


@pytest.mark.parametrize("what", ["transform", "upgrading"])
def test_every_reader_retries_as_often_as_was_asked_for(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    h, source = fct.Transformation.random(D_OLD, D_OLD, D_NEW, inner=16, side_info=False), Silent()

    def read() -> None:
        if what == "transform":
            transform_file(source, tmp_path / "new.npy", h, retries=1)
        else:
            live = fct.UpgradingGallery(source, tmp_path / "new", h, format="npy", retries=1)
            live.topk(np.zeros((1, D_NEW), np.float32), 3)

    with pytest.raises(fct.StoreError, match=r"no answer \(tried twice\)"):
        read()
    assert source.asked == 2
