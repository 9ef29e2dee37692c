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
    seen = [(len(case.old), dtype) for case, dtype in doctor._cases(full=False) if not case.far]
    assert seen == [
        (n, dtype) for _ in doctor.ODD_SHAPES for n in (2, 5) for dtype in ("float32", "float16", "bfloat16")
    ]
