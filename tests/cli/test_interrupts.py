"""Ctrl-C in real processes: an answer at once, nothing half made that looks whole, and the work goes on later."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fct
from fct.gallery import tag_space, vector_array

D, ROWS = 64, 24_000
OLD = ("-t", "h.safetensors", "--old-model", "random-old")
SLOWLY = (*OLD, "--precision", "fp32", "--threads", "1")

# Only Linux tells from outside what a process has opened; Ctrl-C itself is the same elsewhere.
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc says what a process has opened")


class Run:
    """``fct …`` as a child that Ctrl-C reaches, whatever its parent ignores; what it says, with the time."""

    def __init__(self, cwd: Path, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fct", *words], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            stdin=subprocess.DEVNULL, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        self.said: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append((time.monotonic(), line))

    @property
    def text(self) -> str:
        return "".join(line for _, line in self.said)

    def until(self, ready: Callable[[], object]) -> None:
        end = time.monotonic() + 60
        while not ready():
            assert self.process.poll() is None, f"it ended before it could be interrupted: {self.text}"
            assert time.monotonic() < end, "nothing to be seen of it after a minute"
            time.sleep(0.01)

    def reads(self, file: Path) -> bool:
        """Whether the process has opened ``file``, or what lies below it."""
        wanted = str(file.resolve())
        for descriptor in Path(f"/proc/{self.process.pid}/fd").iterdir():
            try:
                if os.readlink(descriptor).startswith(wanted):
                    return True
            except FileNotFoundError:
                continue
        return False

    def close(self) -> None:
        self._reader.join()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()

    def interrupt(self) -> float:
        self.process.send_signal(signal.SIGINT)
        return time.monotonic()

    def answer(self, text: str, since: float) -> float:
        """Seconds from ``since`` until a line with ``text`` came."""
        end = since + 30
        while time.monotonic() < end:
            found = [at for at, line in self.said if text in line]
            if found:
                return found[0] - since
            time.sleep(0.01)
        raise AssertionError(f"no answer {text!r} in {self.text!r}")

    def end(self, since: float, within: float) -> None:
        """Waits for the end by Ctrl-C: exit code 130 and one line."""
        code = self.process.wait(60)
        took = time.monotonic() - since
        self._reader.join()
        assert code == 130, self.text
        assert self.text.endswith("error: interrupted\n"), self.text
        assert took < within, f"it ended {took:.1f} s after Ctrl-C"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery, and an h that needs some seconds for it on one thread."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "old").mkdir()
    np.save(folder / "old/a.npy", np.random.default_rng(0).standard_normal((ROWS, D), dtype=np.float32))
    fct.Transformation.random(D, D, 8, inner=2048, side_info=False).save(folder / "h.safetensors")
    return folder


@pytest.fixture
def start(place: Path) -> Iterator[Callable[..., Run]]:
    begun: list[Run] = []

    def one(*words: str) -> Run:
        begun.append(Run(place, *words))
        return begun[-1]

    yield one
    for run in begun:
        if run.process.poll() is None:
            run.process.kill()
        run.process.wait()
        run.close()


def check_finished(place: Path, name: str) -> None:
    """Goes on where it was stopped, and what comes out is whole."""
    h = fct.Transformation.load(place / "h.safetensors")
    report = fct.backfill(place / "old", place / name, h, old_model="random-old", progress=False, precision="fp32",
                          shard_rows=int(name.rpartition("-")[2]))  # fmt: skip
    assert (report.rows_in, report.rows_out) == (ROWS, ROWS)
    proven = fct.verify_gallery(place / name, source=place / "old")
    assert proven.ok, proven.problems


def test_a_backfill_answers_at_once_finishes_what_is_under_way_and_goes_on_later(
    place: Path, start: Callable[..., Run]
) -> None:
    run = start("backfill", "old", "new-2000", *SLOWLY, "--shard-rows", "2000", "--no-progress")
    run.until(lambda: list((place / "new-2000/_fct/done").glob("0*.json")))
    since = run.interrupt()
    took = run.answer("press Ctrl-C again to leave them", since)
    assert took < 1, f"it answered after {took:.1f} s"
    run.end(since, 30)
    marked = len(list((place / "new-2000/_fct/done").glob("0*.json")))
    assert 2 <= marked < ROWS // 2000, "what was under way was not finished, or nothing was left"
    assert not (place / "new-2000/_fct/manifest.json").exists()
    h = fct.Transformation.load(place / "h.safetensors")
    again = fct.backfill(place / "old", place / "new-2000", h, old_model="random-old", progress=False, precision="fp32",
                         shard_rows=2000)  # fmt: skip
    assert (again.shards_kept, again.rows_out) == (marked, ROWS)


@pytest.mark.slow
def test_pressed_twice_a_backfill_leaves_its_shards_at_once(place: Path, start: Callable[..., Run]) -> None:
    run = start("backfill", "old", f"new-{ROWS}", *SLOWLY, "--shard-rows", str(ROWS), "--no-progress")
    run.until(lambda: list((place / f"new-{ROWS}/_fct/parts").glob("*")))
    time.sleep(0.3)  # the folder is there a moment before its shard is under way
    since = run.interrupt()
    assert run.answer("finishing 1 shard, press Ctrl-C again to leave them", since) < 1
    run.end(run.interrupt(), 10)  # what shows that the shard was left is below; a busy machine takes its time
    assert not list((place / f"new-{ROWS}/_fct/done").glob("0*.json"))
    check_finished(place, f"new-{ROWS}")


def test_a_stopped_transform_leaves_no_file(place: Path, start: Callable[..., Run]) -> None:
    run = start("transform", "old", "out.npy", *SLOWLY)
    run.until(lambda: list(place.glob(".out.npy.*")))
    since = run.interrupt()
    run.end(since, 15)  # the kernel ends its batch first
    assert not [p.name for p in place.iterdir() if "out.npy" in p.name]


@pytest.fixture(scope="module")
def wordy(place: Path) -> Path:
    """A gallery whose rows take their time to be compared and written as JSON."""
    folder = place / "wordy"
    folder.mkdir()
    n = 400_000
    words = pa.array([f"item {i} " for i in range(1000)])
    text = words.take(pa.array(np.random.default_rng(0).integers(0, 1000, n)))
    columns = {"id": np.arange(n), **{f"t{i}": text for i in range(4)}}
    vectors = vector_array(np.ones((n, 8), np.float32))
    pq.write_table(pa.table({**columns, "embedding": vectors}), folder / "a.parquet", row_group_size=50_000)
    tag_space(folder, fct.EmbeddingSpace("random-old", 8))
    return folder


def test_a_stopped_export_leaves_nothing(place: Path, wordy: Path, start: Callable[..., Run]) -> None:
    run = start("export", "wordy", "out", "--to", "qdrant", "--vector-column", "embedding")
    run.until(lambda: [p for p in place.glob(".out.*.part/payload.jsonl") if p.stat().st_size > 1 << 20])
    run.end(run.interrupt(), 10)
    assert not [p.name for p in place.iterdir() if "out" in p.name]


def test_a_stopped_verify_says_nothing_is_proven(place: Path, wordy: Path, start: Callable[..., Run]) -> None:
    h = fct.Transformation.random(8, 8, 4, inner=16, side_info=False)
    fct.backfill(wordy, place / "verified", h, progress=False)
    run = start("verify", "verified", "--source", "wordy")
    run.until(lambda: run.reads(place / "wordy"))
    run.end(run.interrupt(), 10)
    assert run.process.stdout is not None
    assert "ok" not in run.process.stdout.read()
