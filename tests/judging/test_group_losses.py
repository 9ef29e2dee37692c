"""Who loses: groups by hand, no false alarms beyond the promise, real losers found, hostile names, missing values."""

from __future__ import annotations

import json

import numpy as np
import pytest

import fct


def test_by_hand_with_a_group_too_small_for_an_interval() -> None:
    before = np.array([1] * 20 + [1, 0, 1])
    after = np.array([1] * 14 + [0] * 6 + [1, 1, 0])
    found = fct.who_loses(before, after, ["cats"] * 20 + ["dogs"] * 3)
    cats, dogs = found.groups
    assert (cats.name, cats.queries, cats.before, cats.after, cats.negative_flips) == ("cats", 20, 1.0, 0.7, 0.3)
    assert (dogs.queries, dogs.negative_flips, dogs.positive_flips, dogs.interval) == (3, 1 / 3, 1 / 3, None)
    assert found.losers == (cats,)
    assert found.gap_before == pytest.approx(22 / 23 - 1)
    assert found.gap_after == pytest.approx(16 / 23 - 0.7)
    assert json.loads(json.dumps(found.to_dict()))["groups"][0]["loses"] is True
    assert "cats: 100.0 -> 70.0, -30.0" in str(found)
    assert str(found).splitlines()[2].endswith("30.0 % negative flips, 20 queries, loses")


def test_flips_are_those_of_the_measure_of_the_whole() -> None:
    from fct.metrics import negative_flip_rate

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 120)
    old, new = (rng.standard_normal((120, 6), dtype=np.float32) for _ in range(2))
    before, after = (fct.evaluate(x, x, labels, same_items=True, bootstrap=0) for x in (old, new))
    for k in (1, 5):
        found = fct.who_loses(before, after, labels, k=k)
        assert found.overall.negative_flips == pytest.approx(negative_flip_rate(before, after, k=k))
        assert found.overall.after == pytest.approx(after.cmc[k])
        assert sum(g.negative_flips * g.queries for g in found.groups) == pytest.approx(
            found.overall.negative_flips * found.overall.queries
        )
    assert fct.who_loses(before, after, labels, measure="map").overall.before == pytest.approx(before.map)


@pytest.mark.parametrize("size", [10, 40])
def test_equal_groups_are_seldom_called_losers_and_a_real_loser_is_found(size: int) -> None:
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(30), size)
    alarms = 0
    for _ in range(200):
        before, after = rng.random((2, 30 * size)) < rng.choice([0.5, 0.9])
        alarms += bool(fct.who_loses(before, after, groups).losers)
    assert alarms <= 20, "30 groups without any loss: at most 5 % of 200 runs, twice that for chance"
    hurt = after & ~((groups == 7) & (rng.random(30 * size) < 0.95))
    if size == 40:
        assert "7" in [g.name for g in fct.who_loses(before, hurt, groups).losers]


def test_queries_without_a_value_are_counted() -> None:
    found = fct.who_loses([0.5, np.nan, 1, 1], [0.5, 1, np.nan, 0], [0, 0, 1, 1])
    assert (found.left_out, found.overall.queries) == (2, 2)
    assert "2 more queries have no match before or after" in str(found)


def test_of_many_groups_the_greatest_losses_are_printed_and_the_rest_counted() -> None:
    after = np.ones(60)
    after[[7, 30]] = 0
    found = fct.who_loses(np.ones(60), after, np.arange(60))
    lines = str(found).splitlines()
    assert [line.split(":")[0] for line in lines[2:4]] == ["30", "7"]
    assert lines[-1] == "... and 40 more groups, which lose less or gain"
    assert len(found.to_dict()["groups"]) == 60


def test_hostile_names_are_printed_as_text() -> None:
    shown = str(fct.who_loses([1, 0], [0, 1], ["a\x1b[31m\n", "\u202eb"]))
    assert "\x1b" not in shown
    assert "\u202e" not in shown


def test_bad_input_is_refused_by_name() -> None:
    metrics = fct.evaluate(np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32), [0, 0, 1, 1], bootstrap=0)
    with pytest.raises(TypeError, match="before, after: expected RetrievalMetrics twice or scores twice, got list"):
        fct.who_loses(metrics, [1, 1, 1, 1], [0, 0, 1, 1])
    with pytest.raises(ValueError, match="after: expected 2 queries, as before, got 3"):
        fct.who_loses([1, 0], [1, 0, 1], [0, 0])
    with pytest.raises(ValueError, match=r"groups: expected \(2,\), one label per row, got shape \(3,\)"):
        fct.who_loses([1, 0], [1, 0], [0, 0, 1])
    with pytest.raises(ValueError, match="before, after: expected a query with a value in both, got none"):
        fct.who_loses([np.nan], [1.0], [0])
    with pytest.raises(ValueError, match="after: expected finite numbers, or NaN for none, got some that are not"):
        fct.who_loses([1.0], [np.inf], [0])
