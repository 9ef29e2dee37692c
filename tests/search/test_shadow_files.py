"""A saved shadow that is damaged is refused by name, whatever the damage; version 0.1's still load."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fct
from fct import _C
from fct.errors import ArtifactError
from fct.ops.search import cpu_search, levels, shadow_file
from fct.ops.search.cpu_search import Shadow
from fct.search import _fingerprint


@pytest.fixture(params=["whole", "levels", "halves"])
def saved(request: Any, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    rows = (rng.standard_normal((300, 40)) * 0.9 ** np.arange(40)).astype(np.float32)
    if request.param == "levels":
        monkeypatch.setattr(levels, "_LEAST_ROWS", 1)
        monkeypatch.setattr(levels, "_GAIN", 1e9)
    if request.param == "halves":
        monkeypatch.setattr(cpu_search, "_HALVED", 1)
    prepared = fct.prepare_gallery(rows)
    assert isinstance(prepared.shadow, Shadow)
    assert (prepared.shadow.levels is not None) == (request.param == "levels")
    assert (prepared.shadow.low is not None) == (request.param == "halves")
    prepared.save(tmp_path / "x.shadow")
    return tmp_path / "x.shadow", rows


def old_file(rows: Any, **changes: Any) -> bytes:
    """A shadow as version 0.1 wrote it."""
    shadow: Any = fct.prepare_gallery(rows).shadow
    arrays = {name: getattr(shadow, name) for name in ("tiles", "meta", "shift")}
    fingerprint = _fingerprint(fct.prepare_gallery(rows).rows)
    header: dict[str, Any] = {
        "n": len(rows), "d": rows.shape[1], "metric": "l2", "dtype": "float32", "fingerprint": fingerprint,
        "space": None, "arrays": {},
    }  # fmt: skip
    at = 0
    for name, array in arrays.items():
        header["arrays"][name] = {"dtype": array.dtype.name, "shape": array.shape, "offset": at}
        at += -(-array.nbytes // 64) * 64
    text = json.dumps(header | changes).encode()
    lead = b"fctshadow1" + len(text).to_bytes(8, "little") + text
    out = lead + b"\0" * (-len(lead) % 64)
    for array in arrays.values():
        out += array.tobytes() + b"\0" * (-array.nbytes % 64)
    return out


@pytest.mark.parametrize("changed", [0, 1, 150, 298, 299])
def test_a_shadow_of_other_rows_is_refused(saved: tuple[Path, Any], changed: int) -> None:
    path, rows = saved
    other = rows.copy()
    other[changed, 3] += 1
    with pytest.raises(ValueError, match=f"gallery: expected the rows that {path} was made from, got others"):
        fct.PreparedGallery.load(path, other)


def test_version_0_1_is_read(tmp_path: Path, rng: np.random.Generator) -> None:
    rows = rng.standard_normal((130, 9), dtype=np.float32)
    (tmp_path / "old").write_bytes(old_file(rows))
    loaded = fct.PreparedGallery.load(tmp_path / "old", rows)
    np.testing.assert_array_equal(fct.topk(rows[:9], loaded, 5).indices, fct.topk(rows[:9], rows, 5).indices)


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 10**30}, {"n": -1}, {"n": 1.5}, {"n": True}, {"n": None}, {"d": 0}, {"d": 10**9}, {"d": "9"},
        {"metric": "l3"}, {"metric": ["l2"]}, {"dtype": "float64"}, {"fingerprint": 3}, {"space": 7},
        {"space": {"model_id": 3}}, {"n": 1 << 40}, {"levels": {}}, {"levels": {"head": 8, "loss": float("nan")}},
        {"levels": {"head": 12, "loss": 0.1}}, {"levels": {"head": 4, "loss": 1e-4}}, {"levels": 5},
    ],
    ids=str,
)  # fmt: skip
def test_a_header_that_lies_is_refused(changes: dict[str, Any], tmp_path: Path, rng: np.random.Generator) -> None:
    rows = rng.standard_normal((130, 9), dtype=np.float32)
    (tmp_path / "old").write_bytes(old_file(rows, **changes))
    with pytest.raises(ArtifactError, match=r"old: expected"):
        fct.PreparedGallery.load(tmp_path / "old", rows)


@pytest.mark.parametrize("text", [b"[" * 100_000, b"{}", b"[]", b"7", b"\xff", b'{"n": 1' + b"0" * 5000 + b"}"])
def test_a_header_that_is_none_is_refused(text: bytes, tmp_path: Path) -> None:
    lead = b"fctshadow1" + len(text).to_bytes(8, "little") + text
    (tmp_path / "old").write_bytes(lead + b"\0" * 640)
    with pytest.raises(ArtifactError, match=r"old: expected a shadow's header"):
        fct.PreparedGallery.load(tmp_path / "old", np.zeros((1, 1), np.float32))


def mutants(raw: bytes, draw: random.Random, count: int) -> list[bytes]:
    """Bits flipped, bytes changed, pieces cut out, doubled, zeroed and exchanged, and ends cut off."""
    out = []
    for number in range(count):
        data, kind = bytearray(raw), number % 6
        at, size = draw.randrange(len(raw)), draw.choice([1, 2, 8, 64, 500])
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at] = (data[at] + draw.randrange(1, 256)) % 256
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            data[at:at] = data[at : at + size]
        elif kind == 4:
            data[at : at + size] = bytes(len(data[at : at + size]))
        else:
            data = data[:at]
        out.append(bytes(data))
    return out


@pytest.mark.parametrize("at_once", [True, False])
def test_no_mutant_answers_wrong(saved: tuple[Path, Any], at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by name, when it is opened or before it is searched; or nothing that counts has changed."""
    path, rows = saved
    if not at_once:
        monkeypatch.setattr(shadow_file, "_AT_ONCE", 0)
    raw, want = path.read_bytes(), fct.topk(rows[:20], rows, 5, precision="fp32").indices
    refused: list[str] = []
    for data in mutants(raw, random.Random(0), 600):
        path.unlink()  # what is mapped keeps its bytes
        path.write_bytes(data)
        try:
            found = fct.topk(rows[:20], fct.PreparedGallery.load(path, rows), 5).indices
        except ArtifactError as error:
            refused.append(str(error))
        else:
            np.testing.assert_array_equal(found, want)
    assert len(refused) > 500
    assert all(str(path) in message for message in refused)


def test_a_large_shadow_is_verified_before_it_is_searched_or_grown(
    saved: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rows = saved
    monkeypatch.setattr(shadow_file, "_AT_ONCE", 0)
    raw = bytearray(path.read_bytes())
    raw[path.stat().st_size // 2] ^= 4
    path.write_bytes(raw)
    loaded = fct.PreparedGallery.load(path, rows)
    for call in (lambda: fct.topk(rows[:1], loaded, 2), lambda: loaded.append(rows[:5])):
        with pytest.raises(ArtifactError, match=r"x.shadow: expected the shadow that was saved, got a damaged file"):
            call()


def test_the_checksum_is_the_published_one() -> None:
    assert shadow_file._xxh64(np.zeros(0, np.uint8)) == 0xEF46DB3751D8E999
    assert _C.Xxh64().digest() == 0xEF46DB3751D8E999
