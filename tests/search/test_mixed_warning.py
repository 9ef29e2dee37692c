"""Wherever mapped rows meet true ones uncorrected, one warning says so, with the loss that was measured."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.cli import main
from fct.errors import FctWarning
from fct.gallery import export_bulk, tag_space, vector_array

D = 8
LOSS = r"with 50% true rows recall@10 is 0\.400 so, and 0\.600"
MEASURED = {
    "k": 10,
    "correction": {"kind": "length", "value": 0.9},
    "points": [{"true_share": 0.5, "recall": 0.4, "corrected_recall": 0.6}],
}
SHORT = fct.EmbeddingSpace("new", D, metric="ip", mapped_length=0.9)


def unit(rows: Any) -> Any:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def partial(tmp_path: Path, rng: np.random.Generator) -> Callable[..., Path]:
    """Makes a gallery of which half is true; h's own correction is left out unless it is asked for."""

    def make(form: Any, *, mixed: bool = False, column: str = "reembedded", budget: float = 0.5) -> Path:
        h = fct.Transformation.random(D, D, D, inner=16, side_info=False, normalise=True)
        h = h.with_(new_space=fct.EmbeddingSpace("new", D, metric="ip", normalised=True), info={"mixed": MEASURED})
        rows = rng.standard_normal((60, D), dtype=np.float32)
        pq.write_table(pa.table({"id": np.arange(60), "old": vector_array(rows)}), tmp_path / "old.parquet")
        # The correction is written unless the artifact holds none when the rows are: so it is put in afterwards.
        plain = h if mixed else h.with_(info={})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FctWarning)
            fct.backfill(
                tmp_path / "old.parquet", tmp_path / "new", plain, old_model="random-old", progress=False, format=form,
                reembed=lambda ids: unit(np.random.default_rng(0).standard_normal((len(ids), D)).astype(np.float32)),
                budget=budget, true_column=column,
            )  # fmt: skip
        if not mixed:
            h.save(tmp_path / "new/_fct/transformation.safetensors")
        return tmp_path / "new"

    return make


def search(gallery: Path, *more: str) -> str:
    """What ``fct search`` says beside the answer."""
    np.save(gallery.parent / "queries.npy", np.ones((2, D), np.float32))
    files = ["--queries", str(gallery.parent / "queries.npy"), "--gallery", str(gallery), "-k", "2"]
    command = ["search", *files, "--out", str(gallery.parent / "found.jsonl"), "--overwrite", *more]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("always")
        with contextlib.suppress(SystemExit):
            main(command)
    assert (gallery.parent / "found.jsonl").exists()
    return " ".join(said.getvalue().split())


@pytest.mark.parametrize(("form", "column"), [("parquet", "reembedded"), ("npy", "is_true"), ("arrow", "is_true")])
def test_search_and_export_of_a_partial_backfill(
    partial: Callable[..., Path], tmp_path: Path, form: Any, column: str
) -> None:
    new = partial(form, column=column)
    assert re.search(f"--gallery: mapped rows stand among true ones uncorrected, .*{LOSS}", search(new))
    with pytest.warns(FctWarning, match=f"export: mapped rows stand among true ones uncorrected, .*{LOSS}") as caught:
        export_bulk(new, tmp_path / "out", "pgvector", progress=False)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("how", ["corrected", "all mapped", "all true"])
def test_nothing_is_said_where_nothing_is_lost(partial: Callable[..., Path], tmp_path: Path, how: str) -> None:
    budget = {"corrected": 0.5, "all mapped": 0.0, "all true": 1.0}[how]
    new = partial("parquet", mixed=how == "corrected", budget=budget)
    assert search(new) == ""
    export_bulk(new, tmp_path / "out", "pgvector", progress=False)


def test_a_mixed_space_searched_as_if_it_were_plain(
    partial: Callable[..., Path], tmp_path: Path, rng: np.random.Generator
) -> None:
    new = partial("parquet", mixed=True)
    said = search(new, "--metric", "cosine")
    assert "--gallery: mapped rows of 'new' are 0.9 times as long as its own, so that they may stand among them" in said
    assert re.search(rf"compared by cosine, which ignores the length of a row: use ip\. As it is: {LOSS}", said)
    np.save(tmp_path / "tagged.npy", rng.standard_normal((20, D), dtype=np.float32))
    tag_space(tmp_path / "tagged.npy", SHORT)  # a gallery of which nobody has h
    assert "for which that length was not measured: use ip" in search(tmp_path / "tagged.npy", "--metric", "l2")
    assert search(tmp_path / "tagged.npy") == ""


def test_topk_with_a_space(rng: np.random.Generator) -> None:
    rows = rng.standard_normal((20, D), dtype=np.float32)
    prepared = fct.prepare_gallery(rows, metric="cosine", space=SHORT)
    for gallery, space in ((rows, SHORT), (prepared, None)):
        with pytest.warns(FctWarning, match="gallery: mapped rows of 'new' are 0.9 times as long") as caught:
            fct.topk(rows[:2], gallery, 3, metric="cosine", gallery_space=space)
        assert caught[0].filename == __file__
    fct.topk(rows[:2], rows, 3, metric="ip", gallery_space=SHORT)  # a warning would be an error


@pytest.mark.parametrize("store", ["qdrant", "chroma"])
def test_a_collection_that_was_made_for_another_metric(store: str, tmp_path: Path, rng: np.random.Generator) -> None:
    rows = rng.standard_normal((40, D), dtype=np.float32)
    pq.write_table(pa.table({"id": np.arange(40), "old": vector_array(rows)}), tmp_path / "old.parquet")
    h = fct.Transformation.random(D, D, D, inner=16, side_info=False, normalise=True)
    h = h.with_(new_space=fct.EmbeddingSpace("new", D, metric="ip", normalised=True), info={"mixed": MEASURED})
    from fct.gallery.databases.address import Address
    from fct.gallery.databases.documents import clients

    if store == "qdrant":
        models = pytest.importorskip("qdrant_client.models")
        from fct.gallery.databases.qdrant_collection import _client

        url = f"qdrant://{tmp_path / 'db'}?collection=items"
        vectors = models.VectorParams(size=D, distance=models.Distance.COSINE)
        _client(Address.parse(url, "x")).create_collection("items", vectors_config=vectors)
    else:
        pytest.importorskip("chromadb")
        from fct.gallery.databases.chroma_collection import _client as chroma

        url = f"chroma://{tmp_path / 'db'}?collection=items"
        chroma(Address.parse(url, "x")).create_collection(
            "items", configuration={"hnsw": {"space": "cosine"}}, embedding_function=None
        )
    with pytest.warns(FctWarning, match="destination: .* compared by cosine, which ignores the length of a row"):
        fct.backfill(
            tmp_path / "old.parquet", url, h, old_model="random-old", mixed=True, journal=tmp_path / "j", progress=False
        )
    for client in clients.values():
        getattr(client, "close", lambda: None)()
    clients.clear()
