"""The one list of cases by which a backend is proved to run h: the self-proof's, the doctor's and the tests'."""

from __future__ import annotations

import numpy as np
import pytest

from fct import doctor
from fct.artifact.transformation import Transformation
from fct.ops import proof
from fct.ops.transform.cpu_backend import CpuTransform
from fct.ops.weights import packed
from fct.rows import rows_of


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("small", [False, True])
def test_the_cpu_is_right_and_corrupted_outputs_are_not(precision: str, small: bool) -> None:
    branch, blocks = (24, 1) if small else (None, 2)
    h = doctor._calibrated(Transformation.random(24, 17, 40, inner=72, branch=branch, blocks=blocks, skip=small))
    cases = list(proof.transform_cases(h))
    assert [len(case.old) for case in cases if not case.far] == list(proof.ROWS)
    for case in cases:
        out = np.empty((len(case.old), 40), np.float32)
        views = rows_of(case.old, "old"), rows_of(case.side, "side"), rows_of(out, "out", finite=False)
        CpuTransform().run(packed(CpuTransform(), case.h, precision, "cpu"), *views, threads=1)
        assert case.error(out, precision, "cpu")[0] == "", str(case)
        shifted = np.roll(out, 1, axis=1)
        other = out.copy()
        other[-1, -1] += 2 * np.abs(out).max()
        lost = out.copy()
        lost[0, 0] = np.nan
        for wrong in (shifted, other, lost):
            assert "standard deviations of what rounding explains" in case.error(wrong, precision, "cpu")[0]


def test_rows_far_away_are_among_them_where_first_layers_are_exact() -> None:
    h = doctor._calibrated(Transformation.random(24, 17, 40, inner=2048))
    far = [case for case in proof.transform_cases(h) if case.far]
    assert [len(case.old) for case in far] == list(proof.ROWS)
    for case in far:  # 8 bits of a row are seen
        rounded = (case.old.view(np.uint32) & 0xFFFF0000).view(np.float32)
        from fct import ref

        assert case.error(ref.transform(case.old, case.side, case.h), "fp32", "ref")[0] == ""
        assert case.error(ref.transform(rounded, case.side, case.h), "bf16", "cpu")[0] != ""


def test_the_doctor_examines_by_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "ROWS", (2, 5))
    seen = [(len(case.old), dtype) for case, dtype in doctor._cases("bf16", full=False) if not case.far]
    assert seen == [
        (n, dtype) for _ in proof.odd_transformations() for n in (2, 5) for dtype in ("float32", "float16", "bfloat16")
    ]


def test_every_kind_of_plan_is_among_the_odd_ones() -> None:
    found = list(proof.odd_transformations())
    depths = {(len(h.old), len(h.side)) for h in found}
    assert {(2, 2), (1, 1), (1, 2)} <= depths
    for skip in (None, False, True):  # no skip, of old rows alone, of both
        assert any(h.skip is None if skip is None else h.skip is not None and h.uses_side_info == skip for h in found)
    assert {True, False} == {h.length < 1 for h in found if h.normalise}
    assert {True, False} == {h.normalise for h in found}
    assert any(h.skip is not None and len(h.old) == 2 for h in found)
    assert any(h.old[-1].d_out > 128 for h in found if len(h.old) == 1)  # more than one tile of first_layers


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_cpu_runs_them_all(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(proof, "ROWS", (1, 67))
    finding = doctor._prove(CpuTransform(), precision, "cpu", full=False)
    assert (finding.verdict, finding.detail) == ("right", "")


def test_what_a_backend_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoSkip(CpuTransform):
        def why_not(self, h: Transformation, precision: str, device: str) -> list[str]:
            return super().why_not(h, precision, device) + (["has no skip"] if h.skip is not None else [])

    monkeypatch.setattr(proof, "ROWS", (1,))
    finding = doctor._prove(NoSkip(), "fp32", "cpu", full=False)
    assert (finding.verdict, finding.detail) == ("right", "has no skip")
