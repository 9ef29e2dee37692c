"""Chains of upgrades: a line for every fit, and a stopped run fits nothing twice."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fct
import fct.fit.auto_plan as auto_plan

ROOT = Path(__file__).parents[2]


@pytest.fixture
def vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three models of the same items, the first one forgetful; fits are short."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(auto_plan, "_FEW_STEPS", 40)
    monkeypatch.setattr(auto_plan, "_SHAPES", ((16, 16),))
    rng = np.random.default_rng(0)
    latent = {"train": rng.standard_normal((90, 8)), "test": rng.standard_normal((60, 8))}
    maps = [rng.standard_normal((8, d)) for d in (4, 6, 8)]
    named: dict[str, Any] = {f"m{i}_{part}": np.tanh(x @ m) for i, m in enumerate(maps) for part, x in latent.items()}
    np.savez(tmp_path / "vectors.npz", **{name: x.astype(np.float32) for name, x in named.items()})
    return tmp_path / "vectors.npz"


def run(monkeypatch: pytest.MonkeyPatch, vectors: Path, *more: str) -> None:
    from benchmarks.quality import chains

    arguments = ["--vectors", str(vectors), "--models", "m0,m1,m2", "--pairs", "80", "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", ["chains", *arguments, *more])
    chains.main()


def test_every_fit_has_its_line_and_is_kept(
    vectors: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = vectors.with_name("kept")
    real, count = fct.fit_transformation, 0

    def counted(*pairs: Any, **how: Any) -> fct.Transformation:
        nonlocal count
        if count == 2:
            raise KeyboardInterrupt
        count += 1
        return real(*pairs, **how)

    monkeypatch.setattr(fct, "fit_transformation", counted)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, vectors, "--keep", str(keep))
    told = capsys.readouterr().err
    assert "1/4 80-seed0, to v2 in turn: recall@10 " in told
    assert len(list(keep.glob("*.safetensors"))) == 2
    count = -10
    run(monkeypatch, vectors, "--keep", str(keep))
    assert count == -8, "two of the four were there already"
    first = capsys.readouterr()
    assert "4/4 80-seed0, to v3 from the mapped rows" in first.err
    assert first.out.startswith("| pairs | v1 to | in turn | from v1 | from the mapped rows |\n")
    assert "| 80 | v3 (m2) | " in first.out
    count = 2  # the next fit would stop it
    run(monkeypatch, vectors, "--keep", str(keep))
    assert capsys.readouterr().out == first.out


def test_other_pairs_are_not_taken_for_kept_ones(vectors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.quality.kept_fits import KeptFits

    rng = np.random.default_rng(1)
    old, new = rng.standard_normal((2, 40, 6)).astype(np.float32)
    with KeptFits(vectors.with_name("kept"), 3) as fits:
        one = fits.fit("h", old, None, new, seed=0)
        assert fits.fit("h", old, None, new, seed=0).fingerprint == one.fingerprint
        assert fits.fit("h", old + 1, None, new, seed=0).fingerprint != one.fingerprint
        assert fits.fit("h", old, None, new, seed=1).fingerprint != one.fingerprint
    assert len(list(vectors.with_name("kept").iterdir())) == 3, "no checkpoint is left"


def test_the_ranking_term_changes_trainings_while_it_lasts(vectors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.quality.ranking_loss import ranking_term
    from fct.fit.pair_training import PairTraining

    plain = PairTraining._one_step
    with np.load(vectors) as file:
        old, new = file["m0_train"], file["m2_train"]
    found = []
    for weight in (0.0, 0.3):
        with ranking_term(weight):
            h = fct.fit_transformation(old, None, new, progress=False, seed=0)
        found.append(fct.transform_batch(old, None, h, precision="fp32"))
    h = fct.fit_transformation(old, None, new, progress=False, seed=0)
    assert PairTraining._one_step is plain
    np.testing.assert_array_equal(fct.transform_batch(old, None, h, precision="fp32"), found[0])
    assert np.abs(found[0] - found[1]).max() > 1e-3
