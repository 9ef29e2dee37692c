"""Where a gallery's length lies: the rotation and the sizes of a shadow's two levels, fitted on a sample.

Most of a real embedding's length lies in a few directions. A shadow with levels holds its rows rotated, so that the
first ``head`` dimensions are these; a search reads the heads of all rows, and the rest only of rows that the heads
leave over. The rotation is exact mathematics on inexact numbers: ``loss`` bounds the difference (KERNELS.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from fct.types import Floats

__all__ = ["HEADS", "Levels", "fit_levels", "loss_of"]

HEADS = (16, 24, 32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
_LEAST_ROWS = 16_384  # below, a fit costs more than it saves
_ROWS, _QUERIES = 2048, 64  # of the sample
_FACTS = 16  # bytes of a row beside its 8-bit values, scanned with them
_TAIL = 8000  # what one row left over costs beside the bytes of its tail, in bytes of the scan: measured
_GAIN = 0.5  # of the cost without levels, above which it is not worth the trouble
_SUMMED = 128  # as kSummed in csrc/cpu/topk_kernels.inl
_QUANTISED = 0.03  # of |q| |x|: about what 8 bits take off the threshold and add to a row's end
_NEAR = 20  # the rank in the gallery whose key thresholds soon reach


@dataclass(frozen=True)
class Levels:
    """A row x stands as y = x - (x down) up, its first ``head`` dimensions apart from the others.

    head: a multiple of 8. down: (d, head), up: (head, d), float32. loss: times |x| bounds how far the y that float32
    arithmetic finds is from the exact one, and what inner products of exact ones differ by from those of the rows.
    """

    head: int
    down: Floats
    up: Floats
    loss: float


def fit_levels(sample: Floats, shift: Floats | None, n: int) -> Levels | None:
    """The levels of a gallery of n rows, or None where they gain nothing.

    sample: (m, d) float64 rows as they are scanned, drawn evenly from the gallery. shift: what was taken off them but
    is not taken off the queries; None where both are shifted alike (l2).
    """
    d = sample.shape[1]
    if n < _LEAST_ROWS or d < 2 * HEADS[0]:
        return None
    # Matrices this small lose by a second thread of the BLAS: up to tenfold on a busy machine.
    with threadpool_limits(1, "blas"):
        return _fit(sample, shift, n)


def _fit(sample: Floats, shift: Floats | None, n: int) -> Levels | None:
    d = sample.shape[1]
    rows = sample.astype(np.float32)
    scale = float(np.abs(rows).max(initial=0))
    if not 1e-9 < scale < 1e12:
        return None
    rows /= scale
    away = np.zeros(d, np.float32) if shift is None else np.asarray(shift, np.float32) / scale
    heads = [h for h in HEADS if h <= d - 8]
    basis = _basis(rows, away, heads[-1])
    head, cost = _best_head(rows, away, basis, heads, n)
    if cost > _GAIN * (d + _FACTS):
        return None
    down, up = _reflections(_mixed(basis[:, :head]))
    return Levels(head, down, up, loss_of(down, up))


def _basis(rows: Floats, away: Floats, count: int) -> Floats:
    """(d, count) orthonormal float32 columns: the direction of ``away``, then the principal ones of the rows."""
    d = rows.shape[1]
    first = away[:, None] / np.linalg.norm(away) if away.any() else np.zeros((d, 0), np.float32)
    rest = rows - (rows @ first) @ first.T
    wanted = count - first.shape[1]
    if d <= 256:
        found = np.linalg.eigh((rest.T @ rest).astype(np.float64))[1][:, ::-1][:, :wanted].astype(np.float32)
    else:  # one step of subspace iteration: nearly the principal directions is all that is needed
        found = np.random.default_rng(0).standard_normal((d, min(d, wanted + 8)), dtype=np.float32)
        found = np.linalg.qr(rest[::2].T @ (rest[::2] @ found))[0]
        turned = np.linalg.eigh((rest @ found).T @ (rest @ found))[1]
        found = (found @ turned[:, ::-1])[:, :wanted]
    return np.linalg.qr(np.concatenate([first, found], axis=1).astype(np.float64))[0]


def _mixed(basis: Floats) -> Floats:
    """The same space in other coordinates, of about one size each: one large one would cost all others their 8 bits.

    The part that a search looks ahead with (a quarter, see csrc/cpu/topk_likely.cpp) stays apart.
    """
    head = basis.shape[1]
    ahead = 4 * max(4, head // 16)
    rng = np.random.default_rng(0)
    parts = [basis[:, :ahead], basis[:, ahead:]]
    turns = [np.linalg.qr(rng.standard_normal((part.shape[1],) * 2))[0] for part in parts]
    return np.concatenate([part @ turn for part, turn in zip(parts, turns, strict=True)], axis=1)


def _best_head(rows: Floats, away: Floats, basis: Floats, heads: list[int], n: int) -> tuple[int, float]:
    """(head, its cost in bytes a row), for queries like the rows."""
    m, d = rows.shape
    queries = rows[:: max(1, m // _QUERIES)][:_QUERIES] + away
    own = np.arange(0, m, max(1, m // _QUERIES))[:_QUERIES]
    plain = not away.any()
    half = (rows * rows).sum(1) / 2 if plain else np.zeros(m, np.float32)
    keys = queries @ rows.T - half
    keys[np.arange(len(own)), own] = -np.inf
    # A sample's best row is of rank n / m in the gallery. Nearer ones come from how the share grows with the rank.
    ranks = np.array([1, 4, 16])
    bars = -np.partition(-keys, ranks - 1, axis=1)[:, ranks - 1]
    basis = basis.astype(np.float32)
    q, x = queries @ basis, rows @ basis
    q_all, x_all = (queries * queries).sum(1), (rows * rows).sum(1)
    ends = _QUANTISED * np.sqrt(q_all[:, None] * x_all) - half
    best = (0, np.inf)
    for h in heads:
        q_tail, x_tail = (np.maximum(a - (b[:, :h] ** 2).sum(1), 0) for a, b in ((q_all, q), (x_all, x)))
        ends_here = q[:, :h] @ x[:, :h].T + np.sqrt(q_tail[:, None] * x_tail) + ends
        shares = np.array([(ends_here >= bars[:, i : i + 1]).mean() for i in range(len(ranks))]) + 1e-9
        slope = np.polyfit(np.log(ranks), np.log(shares), 1)[0]
        share = float(min(1.0, shares[0] * min(1.0, _NEAR * m / n) ** max(0.0, slope)))
        cost = h + _FACTS + share * (d - h + _TAIL)
        if cost < best[1]:
            best = (h, cost)
    return best


def _reflections(basis: Floats) -> tuple[Floats, Floats]:
    """(down, up) of the product of Householder reflections whose first columns are the basis, up to their signs."""
    head = basis.shape[1]
    raw: Any = np.linalg.qr(basis, mode="raw")
    packed, tau = raw[0].T, raw[1]  # LAPACK's columns: reflector j below the diagonal of column j
    v = np.tril(packed, -1)
    v[np.arange(head), np.arange(head)] = 1
    t = np.zeros((head, head))
    for j in range(head):
        t[j, j] = tau[j]
        t[:j, j] = -tau[j] * (t[:j, :j] @ (v[:, :j].T @ v[:, j]))
    return np.ascontiguousarray(v @ t, np.float32), np.ascontiguousarray(v.T, np.float32)


def loss_of(down: Floats, up: Floats) -> float:
    """What :attr:`Levels.loss` has to be for this rotation, in float64 from the very numbers that are used."""
    a, b = np.asarray(down, np.float64), np.asarray(up, np.float64)
    d, head = a.shape
    # (I - a b)(I - a b)^T - I = [a b^T] k [a b^T]^T, whose norm the triangular factor of [a b^T] gives.
    factor: Any = np.linalg.qr(np.concatenate([a, b.T], axis=1), mode="r")
    eye, zero = np.eye(head), np.zeros((head, head))
    skew = float(np.linalg.norm(factor @ np.block([[b @ b.T, -eye], [-eye, zero]]) @ factor.T)) + 1e-12
    a_norm, b_norm = (float(np.sqrt(np.linalg.eigvalsh(x)[-1])) for x in (a.T @ a, b @ b.T))
    a_all, b_all = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    first, second = _rounding(min(d, _SUMMED) + -(-d // _SUMMED) + 2), _rounding(head + 2)
    into = 2.0**-24 * (1 + skew)
    return 1.01 * (into + first * a_all * b_norm + second * (1 + (1 + first * a_all) * a_norm * b_all) + 2 * skew)


def _rounding(count: int) -> float:
    """The relative error of a float32 sum of so many products, in any order (Higham's gamma)."""
    return count * 2.0**-24 / (1 - count * 2.0**-24)
