"""fct bench: figures that fit together, results compared before they are timed, and peers at their best setting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fct
from fct.bench import throughput as bench
from fct.bench.measure import Peaks
from fct.bench.peers import Worker, best_setting, openblas_times
from fct.bench.throughput import inputs_of, run_bench, same_neighbours
from fct.cli import main
from fct.fit.precision_choice import calibrate


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks without the seconds that measuring them takes; a small gallery."""
    ops = {"fp32": 1e11, "bf16": 2e11, "int8": 4e11}
    monkeypatch.setattr(bench, "measure_peaks", lambda *_, **__: Peaks(ops, {}, 1e10, 2e10, 1))
    monkeypatch.setattr(bench, "_SEARCH", 6e4)
    monkeypatch.setattr(bench, "_SECONDS", 0.01)


@pytest.fixture
def h() -> fct.Transformation:
    h = fct.Transformation.random(16, 8, 12, inner=64)
    return calibrate(h, *inputs_of(h, 200))


def test_figures_fit_together(h: fct.Transformation) -> None:
    told: list[float] = []
    report = run_bench(h, threads=1, peers=False, progress=lambda share, _: told.append(share))
    assert told == sorted(told)
    assert told[-1] == 1.0
    rows = {(r["precision"], r["rows"]): r for r in report.transform}
    assert set(rows) == {(p, n) for p in ("fp32", "bf16", "int8") for n in (4096, 64, 1)}
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
    run = bench.Packed.run

    def wrong(self: Any, old: Any, side: Any, out: Any, *, threads: int) -> None:
        run(self, old, side, out, threads=threads)
        out.values[:] = out.values[::-1].copy()

    monkeypatch.setattr(bench.Packed, "run", wrong)
    report = run_bench(h, threads=1, peers=False)
    assert all(r["status"].startswith("differs: error") for r in report.transform)
    assert not any("rows_per_s" in r for r in report.transform)
    assert report.to_come == []


def test_without_calibration_int8_is_left_out_and_said() -> None:
    report = run_bench(fct.Transformation.random(8, 8, 8, inner=16, side_info=False), threads=1, peers=False)
    assert {r["precision"] for r in report.transform} == {"fp32", "bf16"}
    assert any(note.startswith("int8 is left out: ") for note in report.notes)
    assert report.to_come[0]["bytes_read"] == 10**6 * 4 * 8, "the old embedding is read once"


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
