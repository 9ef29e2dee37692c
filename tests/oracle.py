"""What an exact search may answer: one checker for every backend, and wrong answers that it has to reject."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fct import ref

__all__ = ["cancellation", "check_search", "wrong_answers"]


def check_search(
    distances: Any, indices: Any, queries: Any, gallery: Any, metric: str, *, same_items: bool = False
) -> None:
    """Raises AssertionError unless this is an exact answer.

    Sorted by (score, index); every score that of its row; no row twice, nor the query's own; other rows than the
    reference's only at proven ties: where the two scores are one float32 apart, which is where two float64 sums may
    round apart, or nearer than the terms' own float64 rounding, which is what stays where they cancel. Equal rows tie
    whatever the rounding: of them the lowest come first.
    """
    distances, indices = np.asarray(distances), np.asarray(indices)
    queries, gallery = np.asarray(queries), np.asarray(gallery)
    scores = ref.scores(queries, gallery, metric)
    assert distances.dtype == np.float32, f"distances of {distances.dtype}"
    assert indices.dtype == np.int64, f"indices of {indices.dtype}"
    assert distances.shape == indices.shape, "distances and indices of two shapes"
    assert len(indices) == len(queries), "answers for other queries"
    assert not np.isnan(distances).any(), "a distance that is no number"
    assert ((indices >= 0) & (indices < scores.shape[1])).all(), "a row that the gallery has not"
    ordered = np.sort(indices, axis=1)
    assert (ordered[:, 1:] != ordered[:, :-1]).all(), "a row twice"
    if same_items:
        assert (indices != np.arange(len(indices))[:, None]).all(), "a query's own row"
    cost = distances if metric == "l2" else -distances
    step, later = np.diff(cost, axis=1), np.diff(indices, axis=1)
    assert (step >= 0).all(), "not sorted"
    assert (later[step == 0] > 0).all(), "a tie without the lower index first"
    near = np.spacing(np.abs(distances)) + cancellation(queries, gallery, metric)
    found = np.take_along_axis(scores, indices, axis=1)
    assert (np.abs(found - distances) <= near).all(), "scores that are not their rows'"
    want, rows = ref.topk(queries, gallery, indices.shape[1], metric, same_items)
    assert (np.abs(distances - want) <= near).all(), "not the best scores"
    instead = np.take_along_axis(scores, rows, axis=1)
    other = indices != rows
    assert (np.abs(found - instead) <= 2 * near)[other].all(), "other rows where no scores tie"
    _lowest_of_equal_rows(indices, gallery, same_items)


def _lowest_of_equal_rows(indices: Any, gallery: Any, same_items: bool) -> None:
    _, kind, count = np.unique(gallery, axis=0, return_inverse=True, return_counts=True)
    kind = kind.reshape(-1)
    members = {k: np.flatnonzero(kind == k) for k in np.unique(kind[indices]) if count[k] > 1}
    for query, answer in enumerate(indices):
        for k in members.keys() & set(kind[answer]):
            those = members[k][members[k] != query] if same_items else members[k]
            taken = np.sort(answer[kind[answer] == k])
            assert (taken == those[: len(taken)]).all(), "equal rows, and not the lowest of them"


def cancellation(queries: Any, gallery: Any, metric: str) -> Any:
    """(n_q, 1): how far two float64 sums of the same products may be apart, in two orders of adding."""
    q, g = (np.linalg.norm(np.asarray(x, np.float64), axis=1) for x in (queries, gallery))
    size = {"l2": 0 * q, "ip": q * g.max(), "cosine": np.ones(len(q))}[metric]
    return (np.shape(queries)[1] + 4) * 2.0**-52 * size[:, None]


def wrong_answers(distances: Any, indices: Any, gallery: Any) -> dict[str, tuple[Any, Any]]:
    """An exact answer (of some six queries, nine rows each), spoilt in every way that a search goes wrong."""

    def spoilt(edit: Callable[[Any, Any], None]) -> tuple[Any, Any]:
        d, i = np.array(distances), np.array(indices)
        edit(d, i)
        return d, i

    def swap(d: Any, i: Any) -> None:
        i[2, [1, 4]] = i[2, [4, 1]]

    def duplicate(d: Any, i: Any) -> None:
        i[3, 5], d[3, 5] = i[3, 4], d[3, 4]

    def nan(d: Any, i: Any) -> None:
        d[0, 0] = np.nan

    def turn(d: Any, i: Any) -> None:
        d[1], i[1] = d[1, ::-1].copy(), i[1, ::-1].copy()

    def last_is_next_best(d: Any, i: Any) -> None:
        d[4, -1] = np.nextafter(d[4, -1], np.float32(np.inf)) * np.float32(1.001)

    d, i = np.asarray(distances), np.asarray(indices)
    return {
        "swapped": spoilt(swap),
        "duplicated": spoilt(duplicate),
        "shifted": (d, (i + 1) % len(gallery)),
        "NaN": spoilt(nan),
        "off by one": (np.roll(d, -1, axis=1), np.roll(i, -1, axis=1)),
        "turned": spoilt(turn),
        "the best left out": (d[:, 1:], i[:, 1:]),
        "another score": spoilt(last_is_next_best),
        "another query's": (d[::-1].copy(), i[::-1].copy()),
    }
