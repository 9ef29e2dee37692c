"""The default number of threads: what the process may use, whoever says so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import fct
from fct.ops import processors
from fct.ops.processors import cpu_quota, default_threads, threads_and_why


def machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    """A tree with proc/self/cgroup and quota files below sys/fs/cgroup."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(cgroup)
    for name, text in files.items():
        file = root / "sys" / "fs" / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),  # docker --cpus=1.5, cgroup namespace
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2.0),  # a parent's bounds too
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000\n", "a/cpu.max": "200000 100000\n"}, 0.5),
        ("0::/kube/pod\n", {"cpu.max": "300000 100000\n"}, 3.0),  # the host's path, the container's mount
        ("0::/../other\n", {"cpu.max": "max 100000\n"}, None),
        (
            "4:cpu,cpuacct:/docker/x\n0::/\n",
            {"cpu,cpuacct/docker/x/cpu.cfs_quota_us": "100000\n", "cpu,cpuacct/docker/x/cpu.cfs_period_us": "50000\n"},
            2.0,
        ),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.5),
        ("", {"cpu.max": "nonsense\n"}, None),
        ("0::/\n", {"cpu.max": "100000 0\n"}, None),
    ],
)
def test_quotas_of_containers(tmp_path: Path, cgroup: str, files: dict[str, str], quota: float | None) -> None:
    assert cpu_quota(machine(tmp_path, cgroup, files)) == quota


def test_without_cgroups_there_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("quota", "processors_allowed", "threads", "why"),
    [
        (1.0, 64, 1, "CPU quota of 1 "),
        (1.5, 64, 2, "CPU quota of 1.5 "),
        (0.1, 64, 1, "CPU quota of 0.1 "),
        (8.0, 4, 4, "4 processors of the affinity mask"),
        (None, 64, 64, "64 processors of the affinity mask"),
    ],
)
def test_threads_follow_quota_and_affinity(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, processors_allowed: int, threads: int, why: str
) -> None:
    monkeypatch.delenv("FCT_NUM_THREADS", raising=False)
    monkeypatch.setattr(processors, "_own_quota", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors_allowed)), raising=False)
    assert threads_and_why()[0] == threads
    assert why in threads_and_why()[1]
    assert fct.build_info()["threads"] == threads
    assert why in fct.build_info()["threads_from"]


@pytest.mark.parametrize("value", ["0", "-3", "4097", "999999999999", "two", "1.5", "²"])
def test_a_number_of_threads_out_of_range_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("FCT_NUM_THREADS", value)
    with pytest.raises(ValueError, match="FCT_NUM_THREADS: expected a whole number from 1 to 4096, got"):
        default_threads()


def test_the_environment_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FCT_NUM_THREADS", "3")
    monkeypatch.setattr(processors, "_own_quota", lambda: 1.0)
    assert threads_and_why() == (3, "FCT_NUM_THREADS")
