from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import fct
from fct.backfilling import ray_run
from tests.backfilling.conftest import QUICK, contents
from tests.ray_here import ray_cluster, tried


@pytest.mark.slow
def test_a_node_killed_in_the_middle_changes_no_byte(
    gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path
) -> None:
    source = gallery(30000, bad=(17,))
    with ray_cluster(workers=2) as (cluster, workers):
        fct.backfill(source, tmp_path / "plain", h, progress=False, shard_rows=300, batch_rows=64)
        done = tmp_path / "new/_fct/done"
        left: list[int] = []

        def kill() -> None:
            while not done.is_dir() or len(list(done.glob("[0-9]*.json"))) < 5:
                time.sleep(0.005)
            cluster.remove_node(workers[0], allow_graceful=False)
            left.append(len(list(done.glob("[0-9]*.json"))))

        killer = threading.Thread(target=kill)
        killer.start()
        report = fct.backfill(
            source, tmp_path / "new", h, ray=cluster.address, progress=False, shard_rows=300, batch_rows=64
        )
        killer.join()
        assert left[0] < report.shards, "the node was killed too late"
        assert (report.rows_in, report.rejects) == (30000, 1)
        assert contents(tmp_path / "new") == contents(tmp_path / "plain")
        assert fct.verify_gallery(tmp_path / "new").ok


class Silent:
    """A Ray that does not start; what else is asked of it is noted."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.shut = 0

    def is_initialized(self) -> bool:
        return False

    def init(self, **_: object) -> None:
        raise self.error

    def shutdown(self) -> None:
        self.shut += 1


STARTUP = Exception("The current node timed out during startup. This could happen because ...")
NOBODY = ConnectionError("Failed to connect to Ray cluster at 10.9.9.9:6379")


@pytest.mark.parametrize(
    ("address", "error", "expected"),
    [
        ("local", STARTUP, r"ray: Ray did not start on this machine .*timed out during startup.*"
         r"`ray start --head`.*ray=\"auto\".*/tmp/ray/session_latest/logs.*the same call goes on"),
        ("10.9.9.9:6379", NOBODY, r"ray: expected the address of a running cluster, got '10\.9\.9\.9:6379' .*"
         r"ConnectionError: Failed to connect.*`ray status`.*the same call goes on"),
        ("auto", NOBODY, r"ray: expected the address of a running cluster, got 'auto'"),
    ],
)  # fmt: skip
def test_a_ray_that_does_not_start_is_named_with_what_to_do(
    address: str,
    error: Exception,
    expected: str,
    gallery: Callable[..., Path],
    h: fct.Transformation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("ray")
    silent = Silent(error)
    monkeypatch.setattr(ray_run, "need", lambda *_: silent)
    source = gallery(400)
    with pytest.raises(fct.BackfillError) as raised:
        fct.backfill(source, tmp_path / "new", h, ray=address, **QUICK)
    assert re.match(expected, str(raised.value), re.DOTALL), raised.value
    assert raised.value.__cause__ is error
    assert silent.shut == 1, "what Ray left half-started is shut down"
    monkeypatch.undo()
    assert fct.backfill(source, tmp_path / "new", h, **QUICK).rows_out == 400  # the same job, without Ray
    assert fct.verify_gallery(tmp_path / "new").ok


def test_a_start_is_tried_three_times_and_the_last_error_is_told() -> None:
    ray = SimpleNamespace(shut=0)
    ray.shutdown = lambda: setattr(ray, "shut", ray.shut + 1)
    outcomes: list[Exception | str] = [STARTUP, STARTUP, "there"]

    def begin() -> str:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert tried(begin, ray) == "there"
    assert ray.shut == 2
    outcomes[:] = [STARTUP, STARTUP, NOBODY, "too late"]
    with pytest.raises(ConnectionError, match="Failed to connect to Ray cluster"):
        tried(begin, ray)
    assert outcomes == ["too late"]
