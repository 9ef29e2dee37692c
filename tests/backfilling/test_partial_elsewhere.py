"""A partial backfill is priced before it runs, and runs on a Ray cluster and into databases like a whole one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.cli import main
from fct.gallery import vector_array
from tests.backfilling.conftest import D_NEW, QUICK
from tests.ray_here import tried

pytestmark = pytest.mark.filterwarnings("ignore:reembed")
N = 900
PLAN: dict[str, Any] = {"shard_rows": 300, "batch_rows": 128, "measure_seconds": 0.001}


def true_vectors(ids: list[str]) -> Any:
    return np.stack([np.random.default_rng([7, int(i[5:])]).standard_normal(D_NEW).astype(np.float32) for i in ids])


def test_a_plan_counts_calls_and_money_and_asks_for_nothing(
    gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path
) -> None:
    old, asked = gallery(N), []

    def model(ids: list[str]) -> Any:
        asked.append(len(ids))
        return true_vectors(ids)

    prices: dict[str, Any] = {"price_per_million_embeddings": 2000.0, "embeddings_per_s": 10.0}
    plan = fct.plan_backfill(old, tmp_path / "new", h, budget=0.5, reembed=model, reembed_ids=20, **prices, **PLAN)
    part = plan.reembedding
    assert asked == []
    assert part is not None
    assert (part.rows, part.kept, part.asked, part.cost, part.seconds) == (450, 0, 450, 0.9, 45.0)
    assert plan.seconds >= 45.0
    unpriced = fct.plan_backfill(old, tmp_path / "new", h, budget=0.5, **PLAN)
    assert unpriced.reembedding is not None
    assert (unpriced.reembedding.rows, unpriced.reembedding.cost, unpriced.reembedding.seconds) == (450, None, None)
    fct.backfill(old, tmp_path / "new", h, budget=0.5, reembed=model, reembed_ids=20, **QUICK)
    assert sum(asked) == 450
    assert part.calls == pytest.approx(len(asked), rel=0.3)
    again = fct.plan_backfill(old, tmp_path / "new", h, budget=0.5, reembed=model, **prices, **PLAN).reembedding
    assert again is not None
    assert (again.rows, again.chosen, again.kept, again.calls, again.cost) == (450, True, 450, 0, 0.0)


def test_a_budget_of_none_of_all_and_of_pairs(
    gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path
) -> None:
    old = gallery(N)
    pairs = {"id": [f"item-{i}" for i in range(30)], "new": true_vectors([f"item-{i}" for i in range(30)])}
    for how, rows, calls in (({"budget": 0}, 0, 0), ({"budget": 1}, N, None), ({"reembed": pairs}, 30, 0)):
        part = fct.plan_backfill(old, tmp_path / "new", h, **how, **PLAN).reembedding
        assert part is not None
        assert part.rows == rows
        assert calls is None or part.calls == calls
    with pytest.raises(ValueError, match="price_per_million_embeddings: expected a budget"):
        fct.plan_backfill(old, tmp_path / "new", h, price_per_million_embeddings=1.0, **PLAN)


def test_the_command_line_prints_the_price(
    gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    h.save(tmp_path / "h.safetensors")
    words = ["plan", str(gallery(N)), str(tmp_path / "new"), "-t", str(tmp_path / "h.safetensors"), "--budget", "0.1"]
    with pytest.raises(SystemExit):
        main([*words, "--measure-seconds", "0.001", "--price-per-million-embeddings", "2000"])
    said = " ".join(capfd.readouterr().out.split())
    assert "re-embedded: 90 of 900 rows, in about" in said
    assert "0.18 for 90 true vectors at the price you stated" in said
    assert "state the model's rate with --embeddings-per-s" in said
    assert not (tmp_path / "new").exists()


def test_a_function_that_cannot_be_sent_is_refused_before_anything_is_written(
    gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    connection = threading.Lock()

    def model(ids: list[str]) -> Any:
        with connection:
            return true_vectors(ids)

    with pytest.raises(ValueError, match="reembed: expected a function that Ray can send to its workers, this one"):
        fct.backfill(gallery(50), tmp_path / "new", h, reembed=model, budget=0.5, ray="local", **QUICK)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_on_ray_it_writes_the_same(gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    old = gallery(N)
    notes = tmp_path / "asked"
    notes.mkdir()

    def model(ids: list[str]) -> Any:  # what it was asked for stands in files: it runs in other processes
        import uuid

        (notes / uuid.uuid4().hex).write_text("\n".join(ids))
        rows = [np.random.default_rng([7, int(i[5:])]).standard_normal(12).astype(np.float32) for i in ids]
        return np.stack(rows)

    how: dict[str, Any] = {"budget": 0.3, "reembed_ids": 50, **QUICK}
    fct.backfill(old, tmp_path / "plain", h, reembed=true_vectors, **how)
    report = tried(lambda: fct.backfill(old, tmp_path / "new", h, reembed=model, ray="local", **how), ray)
    assert (report.reembedded, report.chosen) == (270, 270)
    asked = [line for file in notes.iterdir() for line in file.read_text().splitlines()]
    assert len(asked) == len(set(asked)) == 270
    names = sorted(f.name for f in (tmp_path / "plain").glob("*.parquet"))
    assert names
    for name in names:
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert fct.verify_gallery(tmp_path / "new", source=old).proven


@pytest.mark.parametrize("store", ["qdrant", "chroma"])
def test_into_a_database(store: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """Broken off by a function that fails, and gone on with: each row once, and the payload says which are true."""
    pytest.importorskip("qdrant_client" if store == "qdrant" else "chromadb")
    from fct.gallery.databases.address import Address
    from fct.gallery.databases.documents import clients

    h = fct.Transformation.random(16, 16, D_NEW, inner=16, side_info=False)
    rows = rng.standard_normal((200, 16), dtype=np.float32)
    pq.write_table(pa.table({"id": np.arange(200), "old": vector_array(rows)}), tmp_path / "old.parquet")
    url = f"{store}://{tmp_path / 'db'}?collection=items"
    asked: list[int] = []

    def model(ids: list[int], quota: int = 10_000) -> Any:
        if len(asked) >= quota:
            raise ConnectionError("quota used up")
        asked.extend(ids)
        return true_vectors([f"item-{i}" for i in ids])

    how: dict[str, Any] = {
        "old_model": "random-old", "journal": tmp_path / "j", "budget": 0.25, "reembed_ids": 10, "shard_rows": 50,
        "progress": False,
    }  # fmt: skip
    with pytest.raises(fct.BackfillError, match="quota used up"):
        fct.backfill(tmp_path / "old.parquet", url, h, reembed=lambda ids: model(ids, 20), **how)
    report = fct.backfill(tmp_path / "old.parquet", url, h, reembed=model, **how)
    assert (report.rows_out, report.reembedded) == (200, 50)
    assert len(asked) == len(set(asked)) == 50
    if store == "qdrant":
        from fct.gallery.databases.qdrant_collection import _client

        found, _ = _client(Address.parse(url, "x")).scroll("items", limit=1000, with_vectors=True)
        there = {int(p.id): (p.vector, (p.payload or {})["reembedded"]) for p in found}
    else:
        from fct.gallery.databases.chroma_collection import _client as chroma

        got = (
            chroma(Address.parse(url, "x"))
            .get_collection("items", embedding_function=None)
            .get(include=["embeddings", "metadatas"])
        )
        there = {
            int(i): (v, m["reembedded"])
            for i, v, m in zip(got["ids"], got["embeddings"], got["metadatas"], strict=True)
        }
    mapped = fct.transform_batch(rows, None, h, progress=False)
    assert sorted(i for i, (_, true) in there.items() if true) == sorted(asked)
    for i, (vector, true) in there.items():
        want = true_vectors([f"item-{i}"])[0] if true else mapped[i]
        np.testing.assert_allclose(np.asarray(vector, np.float32), want, rtol=1e-4, atol=1e-5)
    for client in clients.values():
        getattr(client, "close", lambda: None)()
    clients.clear()
