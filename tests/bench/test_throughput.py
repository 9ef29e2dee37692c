"""fct bench: figures that fit together, results compared before they are timed, and peers at their best setting."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fct
from fct.bench import measure
from fct.bench import throughput as bench
from fct.bench.bench_report import BenchReport
from fct.bench.measure import Peaks, measure_batch
from fct.bench.peers import Worker, best_setting, openblas_times
from fct.bench.throughput import inputs_of, run_bench, same_neighbours
from fct.cli import main
from fct.fit.precision_choice import calibrate


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Peaks without the seconds that measuring them takes; a small gallery; short pauses."""
    ops = {"fp32": 1e11, "bf16": 2e11, "int8": 4e11}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "measure_peaks", lambda *_, **__: Peaks(ops, {}, 1e10, 2e10, 1))
        patch.setattr(bench, "_SEARCH", 6e4)
        patch.setattr(bench, "_SECONDS", 0.01)
        patch.setattr(measure, "_PAUSE", 0.001)
        yield


@pytest.fixture(scope="module")
def h() -> fct.Transformation:
    h = fct.Transformation.random(16, 8, 12, inner=64)
    return calibrate(h, *inputs_of(h, 200))


@pytest.fixture(scope="module")
def measured(h: fct.Transformation) -> tuple[BenchReport, list[float]]:
    """A whole measurement without peers, and the shares that it told of."""
    told: list[float] = []
    return run_bench(h, threads=1, peers=False, progress=lambda share, _: told.append(share)), told


def test_figures_fit_together(h: fct.Transformation, measured: tuple[BenchReport, list[float]]) -> None:
    report, told = measured
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert {(r["rows"], r["state"]) for r in report.transform} == {
        (4096, "warm"), *((n, state) for n in (64, 8, 1) for state in ("warm", "after a pause"))
    }  # fmt: skip
    rows = {(r["precision"], r["rows"]): r for r in report.transform if r["state"] == "warm"}
    assert set(rows) == {(p, n) for p in ("fp32", "bf16", "int8") for n in (4096, 64, 8, 1)}
    for (precision, n), r in rows.items():
        assert r["status"] == "ok"
        assert r["rows_per_s"] == pytest.approx(1e3 * n / r["ms"])
        assert r["gflops"] == pytest.approx(r["rows_per_s"] * h.flop_per_row / 1e9)
        assert r["share_of_peak"] == pytest.approx(
            r["gflops"] * 1e9 / {"fp32": 1e11, "bf16": 2e11, "int8": 4e11}[precision]
        )
    for r in report.to_come:
        assert r["seconds"] == pytest.approx(r["rows"] / rows[r["precision"], 4096]["rows_per_s"])
        assert r["bytes_read"] == r["rows"] * 4 * (16 + 8)
        assert r["bytes_written"] == r["rows"] * 4 * 12
    assert {r["rows"] for r in report.to_come} == {10**6, 10**9, 10**10}
    assert [r["queries"] for r in report.search] == [1, 1000]
    assert report.search[0]["gallery"] == 5000
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    text = report.markdown()
    assert "10,000,000,000" in text
    assert f"{rows['bf16', 4096]['rows_per_s']:,.0f}" in text


def test_a_wrong_result_is_never_timed(h: fct.Transformation, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fct.transform_batch

    def wrong(*args: Any, **named: Any) -> Any:
        out = run(*args, **named)
        out[:] = out[::-1].copy()
        return out

    monkeypatch.setattr(bench, "transform_batch", wrong)
    report = run_bench(h, threads=1, peers=False)
    assert all(r["status"].startswith("differs: error") for r in report.transform)
    assert not any("rows_per_s" in r for r in report.transform)
    assert report.to_come == []


def test_two_tables_cannot_disagree(measured: tuple[BenchReport, list[float]]) -> None:
    """No time of a batch stands in two tables, and each is the one call of a server, in a state that is named."""
    report, _ = measured
    keys = [(r["who"], r["precision"], r["rows"], r["state"]) for r in report.transform]
    assert len(keys) == len(set(keys)), "one figure for one thing"
    tables = {title: (columns, cells) for title, columns, cells in report.tables()}
    timed = [title for title, (columns, _) in tables.items() if "ms" in columns and "precision" in columns]
    assert timed == [
        "Transformation, batches of 4,096, warm",
        *(f"Transformation, batches of {n}, {s}" for n in (64, 8, 1) for s in ("warm", "after a pause")),
    ]
    columns, cells = tables["One row against reading the packed weights once"]
    assert [row[:2] for row in cells] == [[p, s] for s in ("warm", "after a pause") for p in ("fp32", "bf16", "int8")]
    one = {(r["precision"], r["state"]): r["ms"] for r in report.transform if r["rows"] == 1}
    for w, row in zip(report.weights, cells, strict=True):
        assert row[3] == f"{100 * w['ms'] / one[w['precision'], w['state']]:.0f} %"
        assert "ms" not in columns, "a row's own time is in its own table alone"


def test_warm_calls_come_in_a_row() -> None:
    """Turn by turn, each call would find the others' weights in the caches and its threads asleep."""
    called: list[str] = []

    def call(name: str, seconds: float) -> None:
        called.append(name)
        time.sleep(seconds)

    fns: dict[str, Callable[[], object]] = {"a": lambda: call("a", 0.001), "b": lambda: call("b", 0.002)}
    found = measure_batch(fns, 64, seconds=0.1, rounds=2)
    assert set(found) == {"warm", "after a pause"}
    assert found["warm"]["a"].median < found["warm"]["b"].median
    turns = [name for name, _ in itertools.groupby(called)]
    assert turns[:4] == ["a", "b", "a", "b"]
    assert len(list(next(itertools.groupby(called))[1])) > 10, "many calls in one turn"
    assert found["warm"]["a"].calls < called.count("a"), "the first do not count"
    assert set(measure_batch(fns, 65, seconds=0.01)) == {"warm"}


def test_without_calibration_int8_is_left_out_and_said() -> None:
    report = run_bench(fct.Transformation.random(8, 8, 8, inner=16, side_info=False), threads=1, peers=False)
    assert {r["precision"] for r in report.transform} == {"fp32", "bf16"}
    assert any(note.startswith("int8 is left out: ") for note in report.notes)
    assert report.to_come[0]["bytes_read"] == 10**6 * 4 * 8, "the old embedding is read once"


@pytest.mark.slow
def test_the_peers_are_compared_with_us(h: fct.Transformation, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr("fct.bench.peers.OPENBLAS_SETTINGS", {"OpenBLAS's own choice": {}})
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    monkeypatch.delenv("OPENBLAS_L2_SIZE", raising=False)
    report = run_bench(h.with_(normalise=True), threads=1)
    found = {(r["who"], r["precision"]): r["status"] for r in report.transform if r["rows"] == 64}
    for peer in (
        ("torch folded", "fp32"),
        ("torch folded", "bf16"),
        ("ONNX Runtime", "fp32"),
        ("reference code", "fp32"),
    ):
        assert found[peer] == "ok"
    assert {r["status"] for r in report.search if r["who"].startswith("FAISS")} == {"ok"}


def test_inputs_stay_inside_the_calibrated_ranges(h: fct.Transformation) -> None:
    old, side = inputs_of(h, 70_000)
    assert old.shape == (70_000, 16)
    assert side.dtype == np.float32
    for x, name in ((old, "old.0"), (side, "side.0")):
        low, high = h.calibration[name]
        assert ((x >= low) & (x <= high)).all()


def test_other_neighbours_are_noticed(rng: np.random.Generator) -> None:
    q, g = rng.standard_normal((20, 8), dtype=np.float32), rng.standard_normal((300, 8), dtype=np.float32)
    g[40] = g[7]
    ids = fct.topk(q, g, 10, metric="ip").indices
    tied = np.where(ids == 7, 40, ids)
    assert same_neighbours(q, g, ids, ids)
    assert same_neighbours(q, g, ids, tied) or (tied == ids).all() or (tied != ids).mean() >= 1e-2
    assert not same_neighbours(q, g, ids, np.roll(ids, 1, axis=1))
    wrong = ids.copy()
    wrong[0, 9] = np.argmin(g @ q[0])
    assert not same_neighbours(q, g, ids, wrong)


def test_a_worker_sees_its_settings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_L2_SIZE", "77")
    source = (
        "import os, numpy as np\ndef call():\n"
        "    return np.array([os.environ.get('OPENBLAS_CORETYPE', ''), os.environ.get('OPENBLAS_L2_SIZE', '')])"
    )
    with Worker(source, [], {"OPENBLAS_CORETYPE": "Haswell"}) as worker:
        worker()
        assert worker.result().tolist() == ["Haswell", ""]


def test_a_worker_that_dies_says_why() -> None:
    with (
        Worker("import no_such_package", [], {}) as worker,
        pytest.raises(RuntimeError, match="No module named 'no_such"),
    ):
        worker()


def test_the_fastest_setting_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("OPENBLAS_L2_SIZE", "512")
    source = (
        "import os, time\ndef call(): time.sleep(0.001 if os.environ.get('OPENBLAS_CORETYPE') == 'SkylakeX' else 0.05)"
    )
    times = openblas_times(lambda settings: Worker(source, [], settings), calls=1)
    assert next(iter(times)) == "OPENBLAS_CORETYPE=Haswell OPENBLAS_L2_SIZE=512", "this shell's own comes first"
    assert best_setting(times) == ("OPENBLAS_CORETYPE=SkylakeX", {"OPENBLAS_CORETYPE": "SkylakeX"})
    own = best_setting({"OPENBLAS_CORETYPE=Haswell OPENBLAS_L2_SIZE=512": 1.0, "OpenBLAS's own choice": 2.0})
    assert own[1] == {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_L2_SIZE": "512"}
    assert best_setting({"OpenBLAS's own choice": 1.0})[1] == {}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, text = tmp_path / "b.json", tmp_path / "b.md"
    args = ["bench", "--old", "8", "--side", "8", "--new", "8", "--inner", "16", "--no-peers", "--json", str(out)]
    with pytest.raises(SystemExit) as left:
        main([*args, "--markdown", str(text)])
    assert not left.value.code
    assert {r["who"] for r in json.loads(out.read_text())["transform"]} == {"fct"}
    assert text.read_text().startswith("# fct bench")
    assert "1,000,000,000" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(args)
    assert left.value.code == 1
    assert "--json" in capsys.readouterr().err
