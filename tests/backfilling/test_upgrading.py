"""UpgradingGallery: every shard is made once, under its bound of memory, by whichever thread."""

from __future__ import annotations

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fct
from fct.backfilling.upgrading import UpgradingGallery

D = 12


@pytest.fixture
def h() -> fct.Transformation:
    return fct.Transformation.random(8, 8, D, inner=16, side_info=False)


@pytest.fixture
def half_done(tmp_path: Path, h: fct.Transformation, rng: np.random.Generator) -> tuple[Path, Path, Any]:
    """(source, destination, all new rows): 20 shards, every other one finished."""
    source, new = tmp_path / "old", tmp_path / "new"
    source.mkdir()
    np.save(source / "rows.npy", rng.standard_normal((2000, 8), dtype=np.float32))
    fct.backfill(source, new, h, old_model="random-old", shard_rows=100, format="npy", progress=False)
    rows = np.concatenate([np.load(file) for file in sorted(new.glob("*.npy"))])
    for number in range(0, 20, 2):
        (new / f"_fct/done/{number:08d}.json").unlink()
    return source, new, rows


def opened(half_done: tuple[Path, Path, Any], h: fct.Transformation, **more: Any) -> UpgradingGallery:
    return UpgradingGallery(half_done[0], half_done[1], h, old_model="random-old", shard_rows=100, format="npy", **more)


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, bool]]:
    """How often each shard was made: (number, whether from its finished file)."""
    made: Counter[tuple[int, bool]] = Counter()
    real = UpgradingGallery._make

    def make(self: UpgradingGallery, shard: Any, stamp: Any) -> Any:
        made[shard.number, stamp is not None] += 1
        return real(self, shard, stamp)

    monkeypatch.setattr(UpgradingGallery, "_make", make)
    return made


def test_each_shard_is_read_or_mapped_once(
    half_done: tuple[Path, Path, Any], h: fct.Transformation, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = counted(monkeypatch)
    live = opened(half_done, h)
    queries = rng.standard_normal((5, D), dtype=np.float32)
    want = fct.topk(queries, half_done[2], 9)
    for _ in range(3):
        got = live.topk(queries, 9)
        np.testing.assert_array_equal(got.indices, want.indices)
        np.testing.assert_array_equal(got.distances, want.distances)
    assert made == {(number, number % 2 == 1): 1 for number in range(20)}
    fct.backfill(half_done[0], half_done[1], h, old_model="random-old", shard_rows=100, format="npy", progress=False)
    np.testing.assert_array_equal(live.topk(queries, 9).indices, want.indices)
    assert made == {(number, True): 1 for number in range(20)} | {(number, False): 1 for number in range(0, 20, 2)}


@pytest.mark.parametrize("cache_bytes", [0, 30_000])
def test_what_finds_no_room_is_made_anew(
    cache_bytes: int, half_done: tuple[Path, Path, Any], h: fct.Transformation, rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    made = counted(monkeypatch)
    live = opened(half_done, h, cache_bytes=cache_bytes)
    queries = rng.standard_normal((3, D), dtype=np.float32)
    want = fct.topk(queries, half_done[2], 4)
    for _ in range(2):
        np.testing.assert_array_equal(live.topk(queries, 4).indices, want.indices)
        assert sum(held.nbytes for held in live._held.values()) <= cache_bytes
    again = [number for (number, _), count in made.items() if count == 2]
    assert len(again) == 20 - len(live._held)
    assert bool(live._held) == (cache_bytes > 0)


@pytest.mark.parametrize("what", ["upgrading", "prepared", "loaded"])
def test_threads_search_at_a_time(
    what: str, half_done: tuple[Path, Path, Any], h: fct.Transformation, rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With a switch between threads every microsecond, and shards that finish and vanish meanwhile."""
    made = counted(monkeypatch)
    queries = rng.standard_normal((40, D), dtype=np.float32)
    want = fct.topk(queries, half_done[2], 5).indices
    live = opened(half_done, h)
    prepared = fct.prepare_gallery(half_done[2])
    prepared.save(half_done[1].parent / "shadow")
    loaded = fct.PreparedGallery.load(half_done[1].parent / "shadow", half_done[2])

    def search(i: int) -> bool:
        some = queries[i : i + 1]
        found = (
            live.topk(some, 5) if what == "upgrading" else fct.topk(some, prepared if what == "prepared" else loaded, 5)
        )
        return bool((found.indices == want[i : i + 1]).all())

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            answers = pool.map(search, range(40))
            if what == "upgrading":
                for number in range(1, 20, 2):
                    (half_done[1] / f"_fct/done/{number:08d}.json").unlink()
            assert all(answers)
    finally:
        sys.setswitchinterval(before)
    if what == "upgrading":
        assert all(count == 1 for (number, _), count in made.items() if number % 2 == 0)


def test_shards_of_earlier_passes_are_read(
    tmp_path: Path, h: fct.Transformation, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, new = tmp_path / "old", tmp_path / "new"
    source.mkdir()
    how: Any = {"old_model": "random-old", "shard_rows": 100, "format": "npy"}
    for name in ("a", "b"):  # the second comes when the first is mapped
        np.save(source / f"{name}.npy", rng.standard_normal((200, 8), dtype=np.float32))
        fct.backfill(source, new, h, follow=True, progress=False, **how)
    made = counted(monkeypatch)
    UpgradingGallery(source, new, h, **how).topk(rng.standard_normal((2, D), dtype=np.float32), 3)
    assert made == {(number, True): 1 for number in range(4)}
