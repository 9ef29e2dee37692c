"""How many threads a call takes: the caller's choice, FCT_NUM_THREADS, or the processors this process may use.

A process may use those of its affinity mask (taskset, Slurm, docker --cpuset-cpus) and, in a container with a CPU quota
(docker --cpus, Kubernetes limits), no more than that: threads beyond a quota are stopped in the middle of a block.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

from fct.checks import check_whole, shown

__all__ = ["MOST_THREADS", "cpu_quota", "default_threads", "threads_and_why", "threads_of"]

MOST_THREADS = 4096  # more than machines have processors
_VERSION_1 = ("cpu,cpuacct", "cpuacct,cpu", "cpu")


def threads_of(threads: int | None) -> int:
    """The caller's choice of CPU threads, checked; None: :func:`default_threads`."""
    return default_threads() if threads is None else check_whole(threads, "threads", 1, MOST_THREADS)


def default_threads() -> int:
    """FCT_NUM_THREADS, or the processors this process may use."""
    return threads_and_why()[0]


def threads_and_why() -> tuple[int, str]:
    """:func:`default_threads`, and where the number comes from."""
    value = os.environ.get("FCT_NUM_THREADS", "").strip()
    if value:
        try:
            count = int(value)
        except ValueError:
            count = 0
        if not 1 <= count <= MOST_THREADS:
            raise ValueError(f"FCT_NUM_THREADS: expected a whole number from 1 to {MOST_THREADS}, got {shown(value)}")
        return count, "FCT_NUM_THREADS"
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _own_quota()
    if quota is not None and math.ceil(quota) < allowed:
        return max(1, math.ceil(quota)), f"the container's CPU quota of {quota:g} (cgroup)"
    return allowed, f"the {allowed} processors of the affinity mask"


@functools.cache
def _own_quota() -> float | None:
    """Read once a process, since a call of a few microseconds asks for the threads."""
    return cpu_quota()


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Processors' worth of time that this process may use by its cgroup and those above it; None: as much as there is.

    root: where proc/ and sys/ lie.

    Examples:
        >>> from fct.ops.processors import cpu_quota
        >>> quota = cpu_quota()
        >>> quota is None or quota > 0
        True
    """
    quotas = [quota for folder in _groups(root) if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def _groups(root: Path) -> Iterator[Path]:
    """The cgroup folders that bound this process, its own and all above, of version 1 and 2."""
    mounts = root / "sys" / "fs" / "cgroup"
    yield mounts
    yield from (mounts / name for name in _VERSION_1)
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        number, controllers, path = parts
        if number == "0" and not controllers:
            tops = [mounts, mounts / "unified"]
        elif "cpu" in controllers.split(","):
            tops = [mounts / name for name in _VERSION_1]
        else:
            continue
        inside = [part for part in path.split("/") if part]
        if ".." in inside:  # a group outside the namespace, which cannot be read from here
            continue
        for top in tops:
            yield from (top.joinpath(*inside[:depth]) for depth in range(len(inside) + 1))


def _quota_of(group: Path) -> float | None:
    """Of version 2 ("max 100000", or microseconds and period), else of version 1 (-1: none)."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        except (OSError, ValueError):
            return None
    try:
        share = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return None
    return share if share > 0 else None
