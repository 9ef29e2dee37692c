"""Damaged files, by the thousand, to every parser: right content or fct's own error that names the file. Each case runs
in a process with a memory limit and a time-out (:mod:`tests.generated.sandbox`).

Half a minute in CI over all of them; ``FCT_GENERATED_SECONDS=3600`` for an hour, ``FCT_GENERATED_SEED`` for the same
again.
"""

from __future__ import annotations

import pytest

from tests.generated.budget import seconds, seed
from tests.generated.sandbox import run

# By name and not from the module: the server alone imports what the parsers need.
PLAIN = ["npy", "bin", "npz", "parquet", "arrow", "artifact", "shadow"]
GALLERIES = ["resumed", "finished", "verified", "of_0_1", "exported", "dataset", "delta"]
TORCH = ["idx", "cifar", "yaml", "qrels", "checkpoint", "model"]


@pytest.mark.slow
@pytest.mark.parametrize("names", [PLAIN, GALLERIES, TORCH], ids=["files", "galleries", "training"])
def test_no_damaged_file_crashes_hangs_or_is_read_wrong(names: list[str]) -> None:
    start = seed()
    found = run("tests.generated.parsers", names, start, seconds(8.0 if names is not GALLERIES else 12.0))
    faults = [f"{name}: {fault}" for name, summary in found.items() for fault in summary.faults]
    for name, summary in found.items():
        each = sum(summary.cases.values()) / max(summary.seconds, 1e-9)
        print(f"seed {start}: {name}: {dict(summary.cases)}, {each:.0f} a second")
    assert not faults, "\n".join(faults[:20])
    for name in names:
        assert sum(found[name].cases.values()) >= 3, f"{name}: hardly a case was run"


def test_the_sandbox_tells_what_became_of_a_case() -> None:
    (summary,) = run("tests.generated.bad_jobs", ["bad"], 0, 4.0).values()
    said = "\n".join(summary.faults)
    for word in ("case 1 of seed 0: the process ended with SIGKILL", "case 2 of seed 0: MemoryError", "ValueError: 3"):
        assert word in said, said
    assert summary.cases["fine"] > 0
