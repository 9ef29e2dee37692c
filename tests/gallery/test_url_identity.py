"""Which URLs name the same gallery: a renewed signature or another password does, another host or path does not."""

from __future__ import annotations

import http.server
import json
import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fct
from fct.gallery.location import location_of
from fct.gallery.matrix_files import NpyDestination
from fct.gallery.url_identity import differing_parts, identity_parts, keyed

KEY = "ab" * 32
AWS = "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential={0}&X-Amz-Date={0}&X-Amz-Expires=60&X-Amz-Signature={0}"
SAME = {
    "a pre-signed URL of S3, renewed": (
        "https://b.s3.amazonaws.com/g?" + AWS.format("old"), "https://b.s3.amazonaws.com/g?" + AWS.format("new"),
    ),
    "one of version 2": (
        "https://h/g?AWSAccessKeyId=a&Signature=b&Expires=1", "https://h/g?AWSAccessKeyId=c&Signature=d&Expires=2",
    ),
    "Google's": ("https://h/g?X-Goog-Signature=1&X-Goog-Date=2", "https://h/g?X-Goog-Signature=3&X-Goog-Date=4"),
    "Azure's": (
        "https://a.blob.core.windows.net/c/g.npy?sv=1&se=2&sr=b&sp=r&sig=3",
        "https://a.blob.core.windows.net/c/g.npy?sv=4&se=5&sr=b&sp=rl&sig=6&spr=https",
    ),
    "CloudFront's": ("https://h/g?Policy=1&Signature=2&Key-Pair-Id=3", "https://h/g?Policy=4&Signature=5&Key-Pair-Id=6"),
    "a token as the whole query": ("https://h/g?abcdefghijklmnopqrst", "https://h/g?ABCDEFGHIJKLMNOPQRST"),
    "a token as the user": ("https://token-1@h/g", "https://token-2@h/g"),
    "a signature that was not there": ("https://h/g?part=3", "https://h/g?access_token=x&part=3"),
    "an access key": ("s3://KEY:SECRET@bucket/g", "s3://OTHER:SECRET2@bucket/g"),
    "a password": ("https://me:one@h/g", "https://me:two@h/g"),
    "a password of a database": ("postgresql://me:one@h/d?table=t", "postgres://me:two@h:5432/d?table=t"),
    "the parameters of libpq": (
        "postgresql://me@h/d?table=t&sslmode=require&password=one", "postgresql://h/d?user=me&connect_timeout=3&table=t",
    ),
    "a port that is the usual one": ("https://h/g", "https://H:443/g/"),
    "spellings of a scheme": ("s3a://bucket/g", "s3://bucket/g"),
    "Azure's two ways": ("abfss://c@account.dfs.core.windows.net/g", "az://c/g"),
    "the order of the query": ("https://h/g?a=1&b=2", "https://h/g?b=2&a=1"),
    "percent-encoding": ("https://h/a%20b.npy", "https://h/a b.npy"),
    "a Delta table that is called one": ("delta://s3://b/t", "s3://b/t"),
    "the version of a table": ("s3://b/t?version=3", "s3://b/t"),
}  # fmt: skip
OTHER = {
    "scheme": ("http://h/g", "https://h:80/g"),
    "host": ("https://h/g?X-Amz-Signature=1", "https://i/g?X-Amz-Signature=1"),
    "port": ("https://h:8443/g", "https://h/g"),
    "user": ("https://me:one@h/g", "https://you:one@h/g"),
    "path": ("https://h/g.npy", "https://h/f.npy"),
    "query": ("https://h/g?part=3&sig=1", "https://h/g?part=4&sig=1"),
    "bucket": ("s3://bucket/g", "s3://Bucket/g"),
    "container": ("abfss://c@account.dfs.core.windows.net/g", "abfss://d@account.dfs.core.windows.net/g"),
    "account": ("abfss://c@account.dfs.core.windows.net/g", "abfss://c@other.dfs.core.windows.net/g"),
    "table": ("postgresql://h/d?table=a", "postgresql://h/d?table=b"),
    "vector": ("postgresql://h/d?table=a&vector=v", "postgresql://h/d?table=a&vector=w"),
    "collection": ("qdrant://h?collection=a", "qdrant://h?collection=b"),
    "query ": ("postgresql://h/d?table=a&columns=x", "postgresql://h/d?table=a&columns=x,y"),
    "query  ": ("https://h/g?sv=1", "https://h/g?sv=2"),  # Azure's short names, and no signature beside them
    "path  ": ("iceberg://prod/shop.items", "iceberg://prod/shop.others"),
    "host  ": ("iceberg://prod/shop.items", "iceberg://test/shop.items"),
    "host ": ("postgresql:///d?host=/run/a&table=t", "postgresql:///d?host=/run/b&table=t"),
    "path ": ("postgresql://h/d?table=t", "postgresql://h/e?table=t"),
    "user ": ("postgresql://me@h/d?table=t", "postgresql://you@h/d?table=t"),
}


def differing(one: str, two: str, **options: Any) -> list[str]:
    return differing_parts(keyed(identity_parts(one), KEY), keyed(identity_parts(two, **options), KEY))


@pytest.mark.parametrize("what", SAME)
def test_the_same_gallery_is_reached_by_another_url(what: str) -> None:
    assert differing(*SAME[what]) == []


@pytest.mark.parametrize("what", OTHER)
def test_another_gallery_is_told_by_the_part_that_differs(what: str) -> None:
    assert differing(*OTHER[what]) == [what.strip()]


def test_an_endpoint_is_compared_where_both_name_one() -> None:
    one = keyed(identity_parts("s3://b/g", {"endpoint_url": "http://one:9000"}), KEY)
    two = keyed(identity_parts("s3://b/g", {"client_kwargs": {"endpoint_url": "http://two:9000"}}), KEY)
    assert differing_parts(one, two) == ["endpoint"]
    assert differing_parts(one, keyed(identity_parts("s3://b/g"), KEY)) == []


@pytest.mark.parametrize("path", ["/data/g", "g.npy", "file:///data/g", "C:\\g"])
def test_a_path_of_this_machine_is_known_by_its_files(path: str) -> None:
    assert identity_parts(path) == {}
    assert identity_parts(Path(path)) == {}


def test_a_location_is_its_url() -> None:
    assert identity_parts(location_of("memory://a/b"))["scheme"] == "memory"
    assert identity_parts(location_of("/data/g")) == {}


def test_fingerprints_hold_no_part_and_differ_by_key() -> None:
    parts = identity_parts("postgresql://me:hunter2@h/d?table=items")
    assert "hunter2" not in str(parts)
    assert not {"me", "h", "d", "items"} & {digest for _, digest in keyed(parts, KEY)}
    assert dict(keyed(parts, KEY)).keys() == dict(keyed(parts, "cd" * 32)).keys()
    assert not set(dict(keyed(parts, KEY)).values()) & set(dict(keyed(parts, "cd" * 32)).values())


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Files with the ranges that fsspec asks for; whatever the query says."""

    def do_GET(self) -> None:
        place = Path(self.translate_path(self.path))
        if not place.is_file():
            self.send_error(404)
            return
        body = place.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = body[int(match[1]) : int(match[2]) + 1] if match else body
        self.send_response(206 if match else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        if match:
            self.send_header("Content-Range", f"bytes {match[1]}-{int(match[1]) + len(part) - 1}/{len(body)}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, format: str, *args: Any) -> None:
        return


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "www").mkdir()
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(tmp_path / "www")))
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield int(served.server_address[1])
    served.shutdown()
    served.server_close()


def test_a_resumed_job_takes_a_renewed_url_and_no_other_place(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    np.save(tmp_path / "www/a.npy", np.random.default_rng(0).standard_normal((40, 8), dtype=np.float32))
    h = fct.Transformation.random(8, 8, 4, inner=16, side_info=False)
    how: dict[str, Any] = {"old_model": "random-old", "progress": False, "shard_rows": 10, "retries": 0}
    write, new = NpyDestination.write, tmp_path / "new"

    def breaks(self: Any, shard: Any, *rest: Any) -> Any:
        if shard.number == 2:
            raise OSError(5, "Input/output error")
        return write(self, shard, *rest)

    first = f"http://127.0.0.1:{port}/a.npy?X-Amz-Signature=FIRST&part=1"
    monkeypatch.setattr(NpyDestination, "write", breaks)
    with pytest.raises(fct.FctError, match="Input/output error"):
        fct.backfill(first, new, h, **how)
    monkeypatch.setattr(NpyDestination, "write", write)
    kept = (new / "_fct/job.json").read_text()
    assert "FIRST" not in kept
    assert {name for name, _ in json.loads(kept)["source_parts"]} == {"scheme", "host", "port", "path", "query"}
    elsewhere = first.replace("127.0.0.1", "localhost").replace("FIRST", "SECRET")
    with pytest.raises(
        fct.FctError, match=r"holds another backfill, .*: source: a URL with another host than"
    ) as raised:
        fct.backfill(elsewhere, new, h, **how)
    assert "SECRET" not in str(raised.value)
    plan = fct.plan_backfill(elsewhere, new, h, old_model="random-old", measure_seconds=0)
    assert any("another host" in refusal for refusal in plan.refusals)
    with pytest.raises(fct.FctError, match="a URL with another query than it was begun with"):
        fct.backfill(first.replace("part=1", "part=2"), new, h, **how)
    renewed = first.replace("FIRST", "SECOND")
    report = fct.backfill(renewed, new, h, **how)
    assert (report.rows_out, report.shards_kept > 0) == (40, True)
    assert fct.verify_gallery(new, source=renewed).proven
    body = json.loads((new / "_fct/job.json").read_text())
    assert (len(body["url_key"]), "SECOND" in str(body)) == (64, False)


def test_a_signed_url_of_what_is_not_read_is_refused_without_its_signature(port: int, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    (tmp_path / "www/a.csv").write_text("x")
    with pytest.raises(fct.FctError, match=r"expected files of one format .* got \.csv") as raised:
        fct.gallery.open_source(f"http://127.0.0.1:{port}/a.csv?X-Amz-Signature=SECRET")
    assert "SECRET" not in str(raised.value)


def test_a_job_that_was_begun_without_fingerprints_goes_on(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    from fct.backfilling.job import Job

    np.save(tmp_path / "www/a.npy", np.ones((40, 8), np.float32))
    h = fct.Transformation.random(8, 8, 4, inner=16, side_info=False)
    url, new = f"http://127.0.0.1:{port}/a.npy", tmp_path / "new"
    how: dict[str, Any] = {"old_model": "random-old", "progress": False, "shard_rows": 10, "retries": 0}
    fct.backfill(url, new, h, **how)
    place = new / "_fct/job.json"
    from dataclasses import replace

    job = replace(Job.from_json(place.read_bytes(), "job.json"), url_key="", source_parts=())
    assert b"source_parts" not in job.to_json()
    place.write_bytes(job.to_json())
    (new / "_fct/done/00000001.json").unlink()
    assert fct.backfill(url, new, h, **how).shards_done == 1
    assert json.loads(place.read_text())["source_parts"], "it is kept from now on"
