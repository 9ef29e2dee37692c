"""Bad input is refused with a message that names the argument, what was expected and what came."""

from __future__ import annotations

import json
import mmap
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fct
from fct.atomic_files import atomic_path, refuse_existing, write_bytes
from fct.errors import ArtifactError
from fct.gallery import export_bulk, open_destination, open_source, tag_space

H = fct.Transformation.random(8, 4, 16, inner=32)
PLAIN = fct.Transformation.random(8, 8, 16, inner=32, side_info=False)


def rows(n: int, d: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(n * 1000 + d).standard_normal((n, d)).astype(dtype)


def with_value(value: float, n: int = 6, d: int = 8) -> Any:
    out = rows(n, d)
    out[3, d - 1] = value
    return out


LABELS = np.arange(6) % 2
CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # wrong rank
    "transform: rank": (
        lambda: fct.transform_batch(rows(6, 8)[0], rows(6, 4), H),
        ValueError,
        "old: expected (n, 8), rows of embeddings, got shape (8,)",
    ),
    "transform: rank 3": (
        lambda: fct.transform_batch(rows(6, 8), rows(6, 4)[None], H),
        ValueError,
        "side_info: expected (6, 4), rows of embeddings, got shape (1, 6, 4)",
    ),
    "topk: rank": (
        lambda: fct.topk(rows(2, 8)[0], rows(6, 8), 1),
        ValueError,
        "queries: expected (n, 8), rows of embeddings, got shape (8,)",
    ),
    "fit: rank": (
        lambda: fct.fit_transformation(rows(6, 8)[0], None, rows(6, 8), progress=False),
        ValueError,
        "old: expected (n, d), rows of embeddings, got shape (8,)",
    ),
    # mismatched rows and dims, an h for other dims
    "transform: rows": (
        lambda: fct.transform_batch(rows(6, 8), rows(5, 4), H),
        ValueError,
        "side_info: expected (6, 4) to match old, got (5, 4)",
    ),
    "transform: h for other dims": (
        lambda: fct.transform_batch(rows(6, 9), rows(6, 4), H),
        ValueError,
        "old: expected (n, 8) to match the transformation, got (6, 9)",
    ),
    "transform: side for other dims": (
        lambda: fct.transform_batch(rows(6, 8), rows(6, 64), H),
        ValueError,
        "side_info: expected (6, 4) to match the transformation, got (6, 64)",
    ),
    "transform: side missing": (
        lambda: fct.transform_batch(rows(6, 8), None, H),
        ValueError,
        "side_info: expected (6, 4) of 'random-side', which this transformation was fitted with, got None",
    ),
    "transform: side too much": (
        lambda: fct.transform_batch(rows(6, 8), rows(6, 8), PLAIN),
        ValueError,
        "side_info: expected None, since this transformation was fitted without, got an array",
    ),
    "transform: no h": (
        lambda: fct.transform_batch(rows(6, 8), rows(6, 4), "h.safetensors"),  # type: ignore[call-overload]  # refused
        TypeError,
        "transformation: expected an fct.Transformation, got str",
    ),
    "fit: rows": (
        lambda: fct.fit_transformation(rows(6, 8), rows(6, 4), rows(7, 5), progress=False),
        ValueError,
        "new: expected (6, d) to match old, got (7, 5)",
    ),
    "topk: dims": (
        lambda: fct.topk(rows(2, 9), rows(6, 8), 1),
        ValueError,
        "queries: expected (n, 8) to match the gallery, got (2, 9)",
    ),
    "evaluate: dims": (
        lambda: fct.evaluate(rows(6, 9), rows(6, 8), LABELS),
        ValueError,
        "queries: expected (n, 8) to match the gallery, got (6, 9)",
    ),
    # non-finite values
    "transform: nan": (
        lambda: fct.transform_batch(with_value(float("nan")), rows(6, 4), H),
        ValueError,
        "old: expected finite values, got NaN or infinity in row 3",
    ),
    "transform: -inf in side": (
        lambda: fct.transform_batch(rows(6, 8), with_value(float("-inf"), 6, 4), H),
        ValueError,
        "side_info: expected finite values, got NaN or infinity in row 3",
    ),
    "fit: nan": (
        lambda: fct.fit_transformation(rows(6, 8), None, with_value(float("nan"), 6, 5), progress=False),
        ValueError,
        "new: expected finite values, got NaN or infinity in row 3",
    ),
    "topk: inf": (
        lambda: fct.topk(rows(2, 8), with_value(float("inf")), 1),
        ValueError,
        "gallery: expected finite values, got NaN or infinity in row 3",
    ),
    "evaluate: bfloat16 nan": (
        lambda: fct.evaluate(torch.tensor(with_value(float("nan"))).bfloat16(), torch.zeros(6, 8).bfloat16(), LABELS),
        ValueError,
        "queries: expected finite values, got NaN or infinity in row 3",
    ),
    # empty arrays
    "fit: empty": (
        lambda: fct.fit_transformation(rows(0, 8), None, rows(0, 5), progress=False),
        ValueError,
        "old: expected at least one row, got (0, 8)",
    ),
    "transform: no dimensions": (
        lambda: fct.transform_batch(rows(6, 0), rows(6, 4), H),
        ValueError,
        "old: expected (n, 8) to match the transformation, got (6, 0)",
    ),
    "evaluate: empty gallery": (
        lambda: fct.evaluate(rows(6, 8), rows(0, 8), LABELS, []),
        ValueError,
        "gallery: expected at least one row, got (0, 8)",
    ),
    # unknown metric, dtype, precision, configuration
    "topk: metric": (
        lambda: fct.topk(rows(2, 8), rows(6, 8), 1, metric="l3"),
        ValueError,
        "metric: expected one of l2, ip, cosine, got 'l3'",
    ),
    "evaluate: metric": (
        lambda: fct.evaluate(rows(6, 8), rows(6, 8), LABELS, metric="euclid"),
        ValueError,
        "metric: expected one of l2, ip, cosine, got 'euclid'",
    ),
    "transform: dtype": (
        lambda: fct.transform_batch(rows(6, 8, np.float64), rows(6, 4), H),
        ValueError,
        "old: expected dtype float32, float16, bfloat16 or scaled int8, got float64; convert with .astype('float32')",
    ),
    "transform: bare int8": (
        lambda: fct.transform_batch(np.ones((6, 8), np.int8), rows(6, 4), H),
        ValueError,
        "old: expected int8 rows with a scale, got bare int8; wrap them in fct.ScaledInt8(values, scale)",
    ),
    "transform: a list": (
        lambda: fct.transform_batch([[1.0] * 8], rows(1, 4), H),  # type: ignore[call-overload]  # refused
        TypeError,
        "old: expected a numpy array, a torch tensor or a DLPack object, got list",
    ),
    "transform: precision": (
        lambda: fct.transform_batch(rows(6, 8), rows(6, 4), H, precision="fp8"),
        ValueError,
        "precision: expected one of auto, fp32, bf16, int8, got 'fp8'",
    ),
    "transform: backend": (
        lambda: fct.transform_batch(rows(6, 8), rows(6, 4), H, backend="abacus"),
        ValueError,
        "got 'abacus'",
    ),
    "fit: config": (
        lambda: fct.fit_transformation(rows(6, 8), None, rows(6, 5), config="good", progress=False),
        ValueError,
        "config: expected 'auto', 'best', 'paper' or a fct.fit.recipes.FitConfig, got 'good'",
    ),
    # k > n
    "topk: k": (
        lambda: fct.topk(rows(2, 8), rows(6, 8), 7),
        ValueError,
        "k: expected 1 to 6, the rows of the gallery, got 7",
    ),
    "topk: k of the others": (
        lambda: fct.topk(rows(6, 8), rows(6, 8), 6, same_items=True),
        ValueError,
        "k: expected 1 to 5, the rows of the gallery, without the query's own, got 6",
    ),
    "topk: k 0": (
        lambda: fct.topk(rows(2, 8), rows(6, 8), 0),
        ValueError,
        "k: expected 1 to 6, the rows of the gallery, got 0",
    ),
    # labels of another length
    "evaluate: labels": (
        lambda: fct.evaluate(rows(6, 8), rows(6, 8), LABELS[:5]),
        ValueError,
        "query_labels: expected (6,), one label per row, got shape (5,)",
    ),
    "evaluate: gallery labels": (
        lambda: fct.evaluate(rows(6, 8), rows(4, 8), LABELS, LABELS),
        ValueError,
        "gallery_labels: expected (4,), one label per row, got shape (6,)",
    ),
    "evaluate: labels of floats": (
        lambda: fct.evaluate(rows(6, 8), rows(6, 8), LABELS / 2),
        ValueError,
        "query_labels: expected integer or string labels, got dtype float64",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_with_a_message(case: str) -> None:
    call, kind, message = CASES[case]
    with pytest.raises(kind, match=re.escape(message)):
        call()


# ---- a hostile caller: every entrance of an array with every wrong kind of it ----

A, B, G = rows(6, 8), rows(6, 4), rows(6, 8) + np.float32(0.1)
NO_DTYPE = "expected dtype float32, float16, bfloat16 or scaled int8, got "
ENTRANCES: dict[str, tuple[str, Any, Callable[[Any], Any]]] = {
    "transform old": ("old", A, lambda x: fct.transform_batch(x, B, H)),
    "transform side_info": ("side_info", B, lambda x: fct.transform_batch(A, x, H)),
    "transform out": ("out", rows(6, 16), lambda x: fct.transform_batch(A, B, H, out=x)),
    "topk queries": ("queries", A, lambda x: fct.topk(x, G, 2)),
    "topk gallery": ("gallery", A, lambda x: fct.topk(A, x, 2)),
    "prepare gallery": ("gallery", A, fct.prepare_gallery),
    "append rows": ("rows", A, lambda x: fct.prepare_gallery(A).append(x)),
    "evaluate queries": ("queries", A, lambda x: fct.evaluate(x, G, LABELS)),
    "evaluate gallery": ("gallery", A, lambda x: fct.evaluate(A, x, LABELS)),
    "fit old": ("old", A, lambda x: fct.fit_transformation(x, B, G, progress=False)),
    "fit side_info": ("side_info", B, lambda x: fct.fit_transformation(A, x, G, progress=False)),
    "fit new": ("new", A, lambda x: fct.fit_transformation(A, B, x, progress=False)),
}
WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a list": (lambda x: x.tolist(), "expected a numpy array, a torch tensor or a DLPack object, got list"),
    "a scalar": (lambda x: x[0, 0], "expected a numpy array, a torch tensor or a DLPack object, got float32"),
    "float64": (lambda x: x.astype(np.float64), NO_DTYPE + "float64; convert with .astype('float32')"),
    "complex": (lambda x: x.astype(np.complex64), NO_DTYPE + "complex64"),
    "bool": (lambda x: x > 0, NO_DTYPE + "bool"),
    "strings": (lambda x: x.astype("U5"), NO_DTYPE + "str160"),
    "objects": (lambda x: x.astype(object), NO_DTYPE + "object"),
    "masked": (lambda x: np.ma.masked_equal(x, x[2, 1]), "expected values without a mask, got 1 masked"),
    "sparse": (lambda x: torch.tensor(x).to_sparse(), "expected a dense tensor, got torch.sparse_coo"),
    "meta": (lambda x: torch.tensor(x, device="meta"), "expected a tensor on cpu or cuda, got one on meta"),
    "float8": (lambda x: torch.tensor(x).to(torch.float8_e4m3fn), NO_DTYPE + "float8_e4m3fn"),
    "no dimensions": (lambda x: x[:, :0], "expected "),
    "scale of strings": (lambda x: fct.ScaledInt8(x.astype(np.int8), "a"), "expected a scale of positive floats, got"),
    "complex scale": (lambda x: fct.ScaledInt8(x.astype(np.int8), 1j), "expected a scale of positive floats, got"),
    "scale on meta": (
        lambda x: fct.ScaledInt8(x.astype(np.int8), torch.ones(6, device="meta")),
        "expected a scale of positive floats, got",
    ),
    "zero scale": (lambda x: fct.ScaledInt8(x.astype(np.int8), 0.0), "expected positive finite scales"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_wrong_arrays_are_refused_everywhere(entrance: str, wrong: str) -> None:
    name, right, call = ENTRANCES[entrance]
    make, message = WRONG[wrong]
    with pytest.raises((TypeError, ValueError), match="^" + re.escape(f"{name}: {message}")):
        call(make(right))


def in_mapped_memory(x: Any) -> Any:
    area = mmap.mmap(-1, x.nbytes)  # without a file
    area.write(x.tobytes())
    return np.frombuffer(area, np.float32).reshape(x.shape)


ODD: dict[str, Callable[[Any], Any]] = {
    "big endian": lambda x: x.astype(">f4"),
    "Fortran order": np.asfortranarray,
    "rows backwards": lambda x: x[::-1].copy()[::-1],
    "columns backwards": lambda x: x[:, ::-1].copy()[:, ::-1],
    "every third column": lambda x: np.repeat(x, 3, axis=1)[:, ::3],
    "off its boundary": lambda x: np.frombuffer(b"." + x.tobytes(), np.float32, x.size, 1).reshape(x.shape),
    "a matrix": np.matrix,
    "masked nowhere": lambda x: np.ma.masked_array(x, mask=np.zeros(x.shape, bool)),
    "mapped memory": lambda x: in_mapped_memory(x),
    "read-only": lambda x: np.frombuffer(x.tobytes(), np.float32).reshape(x.shape),
    "gradients": lambda x: torch.tensor(x, requires_grad=True),
    "transposed tensor": lambda x: torch.tensor(x.T.copy()).T,
    "negated lazily": lambda x: torch.complex(torch.zeros(x.shape), torch.tensor(-x)).conj().imag,
}


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # of np.matrix
@pytest.mark.parametrize("odd", ODD)
def test_odd_arrays_give_the_right_answer(odd: str) -> None:
    change = ODD[odd]
    want = fct.transform_batch(A, B, H, precision="fp32")
    got = fct.transform_batch(change(A), change(B), H, precision="fp32")
    assert not getattr(got, "requires_grad", False)
    np.testing.assert_array_equal(np.asarray(got), want)
    for prepare in (lambda x: x, fct.prepare_gallery):
        found = fct.topk(change(A), prepare(change(G)), 3)
        np.testing.assert_array_equal(np.asarray(found.indices), fct.topk(A, G, 3).indices)
    assert fct.evaluate(change(A), change(G), LABELS) == fct.evaluate(A, G, LABELS)


OUTS: dict[str, tuple[Callable[[], Any], str]] = {
    "a tensor that would be copied": (lambda: torch.zeros(16, 6).T, "expected rows whose elements are contiguous"),
    "rows that are one": (lambda: torch.zeros(1, 16).expand(6, 16), "expected rows whose elements are contiguous"),
    "broadcast": (lambda: np.broadcast_to(np.zeros(16, np.float32), (6, 16)), "expected rows whose elements are"),
    "backwards": (lambda: np.zeros((6, 16), np.float32)[::-1], "expected rows whose elements are contiguous"),
    "big endian": (lambda: np.zeros((6, 16), ">f4"), "expected values in this machine's byte order, got >f4"),
    "read-only": (lambda: np.frombuffer(bytes(384), np.float32).reshape(6, 16), "expected a writable array"),
    "gradients": (lambda: torch.zeros(6, 16, requires_grad=True), "expected a tensor that records no gradients"),
}


@pytest.mark.parametrize("out", OUTS)
def test_outputs_that_would_not_arrive_are_refused(out: str) -> None:
    make, message = OUTS[out]
    with pytest.raises(ValueError, match=f"^out: {message}"):
        fct.transform_batch(A, B, H, out=make())


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_an_output_never_shares_memory_with_an_input(kind: str) -> None:
    h = fct.Transformation.random(8, 8, 8, inner=16)
    wide: Any = np.zeros((20, 40), np.float32) if kind == "numpy" else torch.zeros(20, 40)
    old, side = wide[4:10, :8], wide[4:10, 8:16]
    for bad, name in ((old, "old"), (side, "side_info"), (wide[5:11, :8], "old"), (wide[3:9, 15:23], "side_info")):
        with pytest.raises(ValueError, match=f"^out: expected memory of its own, got .* shares some with {name}"):
            fct.transform_batch(old, side, h, out=bad)
    old[:], side[:] = (x if kind == "numpy" else torch.tensor(x) for x in (A, G))
    want = np.asarray(fct.transform_batch(old, side, h))
    for out in (wide[4:10, 16:24], wide[4:10, 32:], wide[10:16, :8], wide[4:5, 24:32]):  # beside them
        n = len(out)
        fct.transform_batch(old[:n], side[:n], h, out=out)
        np.testing.assert_array_equal(np.asarray(out), want[:n])


LABEL_CASES: dict[str, tuple[Any, str]] = {
    "ragged": ([[1], [2, 3]], "expected (6,), one label per row, got"),
    "a word": ("ababab", "expected (6,), one label per row, got shape ()"),
    "none": ([None] * 6, "expected integer or string labels, got dtype object"),
    "objects": (np.array(["a", 1] * 3, object), "expected integer or string labels, got dtype object"),
    "complex": (LABELS * 1j, "expected integer or string labels, got dtype complex128"),
    "a float tensor": (torch.zeros(6).bfloat16(), "expected integer or string labels, got dtype bfloat16"),
    "sparse": (torch.tensor(LABELS).to_sparse(), "expected a dense tensor that holds values"),
    "meta": (torch.zeros(6, dtype=torch.long, device="meta"), "expected a dense tensor that holds values"),
    "masked": (np.ma.masked_array(LABELS, LABELS > 0), "expected labels without a mask, got 3 masked"),
}


@pytest.mark.parametrize("case", LABEL_CASES)
def test_wrong_labels_are_refused(case: str) -> None:
    labels, message = LABEL_CASES[case]
    for name, both in (("query_labels", (labels, LABELS)), ("gallery_labels", (LABELS, labels))):
        with pytest.raises(ValueError, match="^" + re.escape(f"{name}: {message}")):
            fct.evaluate(A, G, *both)


def test_large_unsigned_labels_beside_signed_ones_are_not_merged() -> None:
    """numpy would bring both to doubles, in which these are one number."""
    labels = np.full(6, 2**53, np.int64)
    one_more = np.full(6, 2**53 + 1, np.uint64)
    assert fct.evaluate(A, G, labels, one_more).queries_without_match == 6
    assert fct.evaluate(A, G, labels, one_more - np.uint64(1)).queries_without_match == 0


SCALARS: dict[str, tuple[Callable[[Any], Any], str, tuple[Any, ...]]] = {
    "topk threads": (
        lambda v: fct.topk(A, G, 2, threads=v),
        "threads: expected a whole number from 1 to 4096",
        (0, -1, True, 1.5, "2", [], float("nan"), np.ones(2), 10**9),
    ),
    "prepare threads": (lambda v: fct.prepare_gallery(A, threads=v), "threads: expected a whole", (0, "x")),
    "transform threads": (lambda v: fct.transform_batch(A, B, H, threads=v), "threads: expected a whole", (0, "x")),
    "evaluate threads": (lambda v: fct.evaluate(A, G, LABELS, threads=v), "threads: expected a whole", (0, "x")),
    "k": (lambda v: fct.topk(A, G, v), "k: expected 1 to 6", (True, np.True_, 2.0, "2", None, np.array([2]), -1)),
    "same_items": (
        lambda v: fct.topk(A, G, 2, same_items=v),
        "same_items: expected True or False",
        (None, 1, "no", float("nan"), np.ones(2)),
    ),
    "metric": (lambda v: fct.topk(A, G, 2, metric=v), "metric: expected one of l2", (None, 3, np.ones(2), [])),
    "precision": (lambda v: fct.topk(A, G, 2, precision=v), "precision: expected one of", (None, 3, np.ones(2), [])),
    "gallery space": (
        lambda v: fct.topk(A, G, 2, gallery_space=v),
        "gallery_space: expected an fct.EmbeddingSpace or None",
        (3, "old", np.ones(2), []),
    ),
    "query space": (lambda v: fct.topk(A, G, 2, query_space=v), "query_space: expected an fct.Embedding", (3, "old")),
    "space": (lambda v: fct.prepare_gallery(A, space=v), "space: expected an fct.EmbeddingSpace or None", (3, "old")),
    "device": (lambda v: fct.transform_batch(A, B, H, device=v), "device: expected a name like", (3, [], np.ones(2))),
    "backend": (lambda v: fct.transform_batch(A, B, H, backend=v), "backend: expected the name", (3, [], np.ones(2))),
    "ks": (lambda v: fct.evaluate(A, G, LABELS, ks=v), "ks: expected ", (3, None, "12", [2.0], [0], [True])),
    "bootstrap": (
        lambda v: fct.evaluate(A, G, LABELS, bootstrap=v),
        "bootstrap: expected a whole number of at least 0",
        (-1, None, 1.5, "3", True, np.ones(2)),
    ),
    "confidence": (
        lambda v: fct.evaluate(A, G, LABELS, confidence=v),
        "confidence: expected a share between 0 and 1",
        (0, 1.0, None, "3", float("nan"), np.ones(2)),
    ),
    "seed": (lambda v: fct.evaluate(A, G, LABELS, seed=v), "seed: expected a whole number", (-1, None, 1.5, "3", [])),
    "random": (lambda v: fct.Transformation.random(3, 3, v), "d_new: expected a whole number", (0, True, 1.5, "3")),
    "random seed": (lambda v: fct.Transformation.random(3, 3, 3, seed=v), "seed: expected a whole", (-1, 1.5, "3")),
    "fit seed": (
        lambda v: fct.fit_transformation(A, B, G, seed=v, progress=False),
        "seed: expected a whole number",
        (-1, None, 1.5, "3", 10**20),
    ),
    "fit space": (
        lambda v: fct.fit_transformation(A, B, G, old_space=v, progress=False),
        "old_space: expected an fct.EmbeddingSpace or None",
        (3, "old"),
    ),
    "fit tolerance": (
        lambda v: fct.fit_transformation(A, B, G, tolerance=v, progress=False),
        "tolerance: expected a Tolerance or None",
        (0.1, "old"),
    ),
    "max_rejects": (
        lambda v: fct.backfill("x", "y", H, max_rejects=v),
        "max_rejects: expected a whole number of at least 0",
        (-1, True, float("nan"), "3", 1.5),
    ),
    "workers": (lambda v: fct.plan_backfill("x", "y", H, workers=v), "workers: expected a whole", (0, 1.5, "3")),
    "spot_check": (lambda v: fct.verify_gallery("x", spot_check=v), "spot_check: expected a whole", (-1, 1.5, "3")),
    "images": (
        lambda v: fct.train_side_info(v, progress=False),
        "images: expected",
        ("x", np.zeros((3, 8, 8), object), torch.zeros(3, 8, 8, device="meta"), 3),
    ),
    "backbone": (
        lambda v: fct.train_side_info(np.zeros((3, 8, 8), np.uint8), backbone=v, progress=False),
        "backbone: expected a name or a torch module",
        (3, []),
    ),
}


CHOSEN: tuple[Any, ...] = (None, 3, "", [], np.ones(2), np.array(["npy"]), b"npy", float("nan"), True)


def job(name: str) -> Callable[[Any], Any]:
    """A backfill with one option; a wrong one is refused before any file is looked for."""
    return lambda v: fct.backfill("no such gallery", "new", H, **{name: v})


SCALARS |= {
    "format": (
        job("format"),
        "format: expected one of auto, npy, bin, parquet, arrow, vortex, lance, delta, got ",
        CHOSEN,
    ),
    "vector_format": (job("vector_format"), "vector_format: expected one of auto, fixed_size_list, list, bin", CHOSEN),
    "dtype": (job("dtype"), "dtype: expected one of auto, float32, float16, got ", CHOSEN),
    "binary_dtype": (job("binary_dtype"), "binary_dtype: expected one of float32, float16, got ", (*CHOSEN, "auto")),
    "backfill precision": (job("precision"), "precision: expected one of auto", CHOSEN),
    "backfill device": (job("device"), "device: expected a name like", (None, 3, [], np.ones(2))),
    "vector_column": (job("vector_column"), "vector_column: expected the name of a", (None, 3, [], np.ones(2))),
    "side_column": (job("side_column"), "side_column: expected the name of a column", (None, 3, [], np.ones(2))),
    "id_column": (job("id_column"), "id_column: expected the name of a column, got", (None, 3, [], np.ones(2))),
    "old_model": (job("old_model"), "old_model: expected the id of a model or None", (3, [], np.ones(2))),
    "keep_side_info": (job("keep_side_info"), "keep_side_info: expected True or False", (None, 1, np.ones(2))),
    "scale": (job("scale"), "scale: expected ", (None, 0, -1, True, float("nan"), float("inf"))),
    "shard_rows": (job("shard_rows"), "shard_rows: expected a whole number of at least 1", (0, True, 1.5, np.ones(2))),
    "batch_rows": (job("batch_rows"), "batch_rows: expected a whole number of at least 1", (0, True, "3", [])),
    "filesystem": (job("filesystem"), "filesystem: expected fsspec's or pyarrow's", (3, "s3", [], np.ones(2))),
    "storage_options": (job("storage_options"), "storage_options: expected a mapping", (3, "key=x", [], np.ones(2))),
    "ray": (job("ray"), "ray: expected auto, local", (3, [], np.ones(2))),
    "min_recall": (
        lambda v: fct.plan_backfill("x", "y", H, pairs={"old": A, "side": B, "new": G}, min_recall=v),
        "min_recall: expected a share or None",
        ("0.9", [], np.ones(2), True),
    ),
    "export to": (lambda v: export_bulk("x", "y", v), "to: expected one of milvus, qdrant, pgvector, got", CHOSEN),
    "destination format": (lambda v: open_destination("x", v), "format: expected one of npy, bin, parq", CHOSEN),
}


@pytest.mark.parametrize("case", SCALARS)
def test_wrong_scalars_are_refused(case: str) -> None:
    call, message, values = SCALARS[case]
    for value in values:
        with pytest.raises((TypeError, ValueError), match="^" + re.escape(message)):
            call(value)


PATHS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "load": ("path", fct.Transformation.load),
    "save": ("path", H.save),
    "to_onnx": ("path", H.to_onnx),
    "from_ml_fct": ("path", fct.Transformation.from_ml_fct),
    "save shadow": ("path", lambda v: fct.prepare_gallery(A).save(v)),
    "load shadow": ("path", lambda v: fct.PreparedGallery.load(v, A)),
    "source": ("source", lambda v: fct.backfill(v, "new", H)),
    "plan source": ("source", lambda v: fct.plan_backfill(v, "new", H)),
    "upgrading source": ("source", lambda v: fct.UpgradingGallery(v, "new", H)),
    "transformation": ("transformation", lambda v: fct.backfill("old", "new", v)),
    "pairs": ("pairs", lambda v: fct.plan_backfill("old", "new", H, pairs=v, min_recall=0.9)),
    "verify": ("path", fct.verify_gallery),
    "tag_space": ("gallery", lambda v: tag_space(v, H.old_space)),
    "open_source": ("source", open_source),
    "open_destination": ("destination", lambda v: open_destination(v, "npy")),
    "checkpoint of h": ("checkpoint", lambda v: fct.fit_transformation(A, B, G, checkpoint=v, progress=False)),
    "checkpoint of side-information": (
        "checkpoint",
        lambda v: fct.train_side_info(np.zeros((3, 8, 8), np.uint8), checkpoint=v, progress=False),
    ),
    "overwritten": ("out", lambda v: refuse_existing(v, overwrite=False, name="out")),
}


@pytest.mark.parametrize("wrong", [None, 5, 1.5, b"h", ["h"], np.ones(2), True, "", "a\0b", {"h"}], ids=repr)
@pytest.mark.parametrize("case", PATHS)
def test_wrong_paths_are_refused(case: str, wrong: Any) -> None:
    name, call = PATHS[case]
    if wrong is None and case in ("pairs", "checkpoint of h", "checkpoint of side-information"):
        return  # means that there is none
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected .*, got "):
        call(wrong)


def test_an_output_is_no_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would become a folder of that name here."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^out: expected a path of this machine, got s3://bucket/new.npy$"):
        refuse_existing("s3://bucket/new.npy", overwrite=False, name="out")


def test_pairs_that_are_no_npz_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", A)
    (tmp_path / "b.npz").write_bytes(b"PK\x03\x04 torn")
    (tmp_path / "c.npz").write_bytes(b"no archive at all")
    for name in ("a.npy", "b.npz", "c.npz"):
        what = "columns old and new, " if name == "a.npy" else "a whole .npz of arrays, "
        with pytest.raises(ValueError, match=rf"^pairs: expected {what}.*{name} (is not: |has vector$)"):
            fct.plan_backfill("old", "new", H, pairs=tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"^pairs: expected an .npz file, found none at .*d.npz$"):
        fct.plan_backfill("old", "new", H, pairs=tmp_path / "d.npz")


def test_rows_appended_to_another_gallery_are_refused() -> None:
    prepared = fct.prepare_gallery(A)
    both = np.concatenate([A, G[:2]])
    assert len(prepared.append(G[:2], gallery=both)) == 8
    for other in (both * 2, np.concatenate([A, A[:2]])):
        with pytest.raises(ValueError, match=r"^gallery: expected the old rows and then the new, got others"):
            prepared.append(G[:2], gallery=other)


@pytest.mark.parametrize("way", ["npy", "raw at an offset", "mmap"])
def test_a_file_truncated_after_mapping_is_refused(tmp_path: Path, way: str) -> None:
    """To read behind its end would be SIGBUS, the end of the process."""
    x = rows(5000, 8)
    path = tmp_path / "x"
    lead = 8192 + 64 if way == "raw at an offset" else 0
    mapped: Any
    if way == "npy":
        with open(path, "wb") as file:
            np.save(file, x)
        mapped = np.load(path, mmap_mode="r")
    else:
        path.write_bytes(bytes(lead) + x.tobytes())
        mapped = np.memmap(path, np.float32, "r", lead, x.shape)
    if way == "mmap":
        with open(path, "rb") as file:
            area = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped = np.frombuffer(area, np.float32).reshape(x.shape)
    prepared = fct.prepare_gallery(mapped)
    fct.topk(mapped[:3], prepared, 2)
    with open(path, "r+b") as file:
        file.truncate(lead + 4096)
    calls: dict[str, Callable[[], Any]] = {
        "gallery": lambda: fct.topk(A, mapped, 2),
        "gallery:": lambda: fct.topk(A, prepared, 2),
        "queries": lambda: fct.topk(mapped[-3:], G, 2),
        "old": lambda: fct.transform_batch(mapped, rows(5000, 4), H),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"^{name.strip(':')}: expected a mapped file of at least .* truncated"):
            call()
    assert fct.topk(mapped[:3], G, 2).indices.shape == (3, 2)  # what is still there can be read


def test_a_shadow_truncated_after_mapping_is_refused(tmp_path: Path) -> None:
    x = rows(5000, 8)
    fct.prepare_gallery(x).save(tmp_path / "shadow")
    prepared = fct.PreparedGallery.load(tmp_path / "shadow", x)
    fct.topk(A, prepared, 2)
    with open(tmp_path / "shadow", "r+b") as file:
        file.truncate(8192)
    with pytest.raises(ValueError, match=r"^gallery: expected a mapped file of at least"):
        fct.topk(A, prepared, 2)


def test_no_rows_are_fine_where_nothing_is_learned() -> None:
    assert fct.transform_batch(rows(0, 8), rows(0, 4), H).shape == (0, 16)
    assert fct.topk(rows(0, 8), rows(6, 8), 2).indices.shape == (0, 2)


# ---- files ----


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return H.save(tmp_path / "h.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_safetensors(artifact: Path, keep: int) -> None:
    artifact.write_bytes(artifact.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"transformation: expected a whole \.safetensors file, .*h\.safetensors"):
        fct.Transformation.load(artifact)


def test_foreign_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(3, np.float32)}, str(tmp_path / "x.safetensors"))
    with pytest.raises(ArtifactError, match=r"is a \.safetensors file but not one of fct's"):
        fct.Transformation.load(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"PK\x03\x04 this is no safetensors file at all")
    with pytest.raises(ArtifactError, match=r"expected a whole \.safetensors file"):
        fct.Transformation.load(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match=r"expected a \.safetensors file, found none at"):
        fct.Transformation.load(tmp_path / "none.safetensors")


def changed_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    inner = json.loads(header["__metadata__"]["fct"])
    change(inner)
    header["__metadata__"]["fct"] = json.dumps(inner)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def test_an_artifact_of_another_version(artifact: Path) -> None:
    changed_header(artifact, lambda h: h.update(version=99))
    with pytest.raises(ArtifactError, match=r"expected fct-transformation version 1 to 2, .* version 99"):
        fct.Transformation.load(artifact)


def test_an_artifact_without_its_plan(artifact: Path) -> None:
    changed_header(artifact, lambda h: h.pop("plan"))
    with pytest.raises(ArtifactError, match=r"is damaged: KeyError\('plan'\)"):
        fct.Transformation.load(artifact)


def test_a_changed_weight_is_seen(artifact: Path) -> None:
    data = bytearray(artifact.read_bytes())
    data[-3] ^= 1
    artifact.write_bytes(data)
    with pytest.raises(ArtifactError, match="do not match its fingerprint"):
        fct.Transformation.load(artifact)


# ---- writing ----


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    assert refuse_existing(tmp_path / "full", overwrite=False, folder=True) == tmp_path / "full"
    (tmp_path / "full" / "x").touch()
    with pytest.raises(FileExistsError, match=r"--out: .*full exists; choose another place or pass --overwrite"):
        refuse_existing(tmp_path / "full", overwrite=False, name="--out", folder=True)
    assert refuse_existing(tmp_path / "full", overwrite=True, folder=True) == tmp_path / "full"
    with pytest.raises(IsADirectoryError, match=r"--out: expected a file to write, .*full is a folder"):
        refuse_existing(tmp_path / "full", overwrite=True, name="--out")  # whatever lies in it


def test_an_error_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "x.bin"
    write_bytes(target, b"old")

    def fails() -> None:
        with atomic_path(target) as part:
            part.write_bytes(b"half of the n")
            raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        fails()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_leaves_the_old_file(artifact: Path) -> None:
    """The kernel itself refuses to let the file grow, as on a full disk."""
    before = artifact.read_bytes()
    code = f"""
import resource, signal, fct
h = fct.Transformation.random(8, 4, 16, inner=64)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
h.save({str(artifact)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "in the middle of writing; what was there before is untouched" in done.stderr.splitlines()[-1]
    assert str(artifact) in done.stderr.splitlines()[-1]
    assert artifact.read_bytes() == before
    assert list(artifact.parent.iterdir()) == [artifact]
