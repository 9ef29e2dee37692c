"""URLs: which are opened, and that no password, token or signature of one is shown or kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fct
from fct.backfilling.job import Job
from fct.gallery.location import location_of
from fct.gallery.urls import redacted, secrets_of, without_secrets

SECRET = {
    "http://user:PASSWORD@host:81/a.npy": "http://redacted@host:81/a.npy",
    "https://TOKEN@host/a.npy": "https://redacted@host/a.npy",
    "http://host/a.npy?X-Amz-Signature=SIGNATURE&x=.npy": "http://host/a.npy?X-Amz-Signature=redacted&x=redacted",
    "https://account.blob.core.windows.net/c/a.npy?sv=2&sig=SIGNATURE%3D": (
        "https://account.blob.core.windows.net/c/a.npy?sv=redacted&sig=redacted"
    ),
    "https://host/a.npy?SIGNATURE-AS-THE-WHOLE-QUERY": "https://host/a.npy?redacted",
    "https://host/a.npy#access_token=TOKEN": "https://host/a.npy#redacted",
    "s3://KEY:SECRET@bucket/a": "s3://redacted@bucket/a",
    "error at 'http://a:PASSWORD@h/x' and 'http://b:TOKEN@h/y'": "error at 'http://redacted@h/x' and 'http://redacted@h/y'",
}
OPEN = [
    *("postgresql://me@host/db?table=items&vector=v", "qdrant://host:6333?collection=c"),
    *("/data/a?b=c@d", "a.npy", "s3://bucket/folder/a.npy", "abfs://container@account.dfs.core.windows.net/a"),
    *("gs://bucket/a*b", "s3://bucket/a?versionId=3HL4k", "http://host:80/a.npy?download", "memory://x"),
]


@pytest.mark.parametrize("url", SECRET)
def test_a_url_is_shown_without_its_secrets(url: str) -> None:
    assert redacted(url) == SECRET[url]
    assert redacted(redacted(url)) == redacted(url)
    assert not any(secret in redacted(url) for secret in ("PASSWORD", "TOKEN", "SIGNATURE", "SECRET"))


@pytest.mark.parametrize("url", OPEN)
def test_a_url_without_secrets_is_shown_as_it_is(url: str) -> None:
    assert redacted(url) == url
    assert secrets_of(url) == ()


def test_a_librarys_message_loses_the_secrets_in_every_spelling() -> None:
    url = "http://me:pass%2Fword@host/a?sig=ab%2Bcd"
    message = without_secrets("404 for http://me:pass/word@host/a, sig ab+cd, raw ab%2Bcd and pass%2Fword", url)
    assert not any(secret in message for secret in ("pass/word", "pass%2Fword", "ab+cd", "ab%2Bcd"))


REFUSED = {
    "zip://a.npy::s3://bucket/a.zip": "a chain of them",
    "simplecache::s3://bucket/a": "a chain of them",
    "s3://bucket/a.zip::zip://a": "a chain of them",
    "ssh://host/a": "expected a path or a URL of file",
    "reference://x": "expected a path or a URL of file",
    "python://x": "for another store pass its fsspec or pyarrow filesystem",
    "ftp://user:PASSWORD@host/a": "got ftp://redacted@host/a",
}


@pytest.mark.parametrize("url", REFUSED)
def test_only_stores_are_opened(url: str) -> None:
    with pytest.raises(ValueError, match="source: ") as error:
        location_of(url, name="source")
    assert REFUSED[url] in str(error.value)


def test_colons_in_a_local_name_are_a_name(tmp_path: Path) -> None:
    assert location_of(tmp_path / "a::b").local == tmp_path / "a::b"


def test_an_older_job_whose_names_hold_a_signature_goes_on_without_it(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((4, 8), np.float32))
    h = fct.Transformation.random(8, 8, 4, inner=16, side_info=False)
    job = fct.plan_backfill(tmp_path / "a.npy", tmp_path / "new", h, old_model="random-old", measure_seconds=0.01).job
    assert job is not None
    from dataclasses import replace

    name = "a.npy?X-Amz-Signature=SIGNATURE&x=.npy"
    old = replace(job, source=f"http://host/{name}", pieces=(replace(job.pieces[0], name=name),))
    now = Job.from_json(old.to_json(), "job.json")
    assert b"SIGNATURE" not in now.to_json()
    assert now.fingerprint == old.fingerprint  # so that its markers are still its own
    assert Job.from_json(now.to_json(), "job.json") == now
    assert now.pieces[0].name == "a.npy?X-Amz-Signature=redacted&x=redacted"
