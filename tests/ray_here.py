"""Ray for tests and benchmarks: one way to start it, which outlives a machine that is slow for a minute.

A Ray node that has not registered after 30 seconds is given up (``The current node timed out during startup``), and
Ray 2 has no setting for it; two processors that also end a database's server take longer now and then.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest

__all__ = ["ray_cluster", "ray_here", "tried"]

T = TypeVar("T")

TRIES = 3


def tried(begin: Callable[[], T], ray: Any, *, only: type[Exception] = Exception) -> T:
    """What ``begin`` returns, at the third try at the latest; Ray is shut down after each that failed."""
    for left in reversed(range(TRIES)):
        try:
            return begin()
        except only as error:  # Ray raises Exception itself here
            ray.shutdown()
            if not left:
                raise
            print(f"Ray did not start, {left} tries left: {type(error).__name__}: {error}", file=sys.stderr)
    raise AssertionError("unreachable")


@contextlib.contextmanager
def ray_here(*, num_cpus: int) -> Iterator[Any]:
    """Ray on this machine alone, shut down in the end; skips the test where it is not installed."""
    ray = pytest.importorskip("ray")
    ray.shutdown()  # another test's
    tried(lambda: ray.init(num_cpus=num_cpus, include_dashboard=False, log_to_driver=False), ray)
    try:
        yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def ray_cluster(*, workers: int) -> Iterator[tuple[Any, list[Any]]]:
    """A cluster of a head and workers, one CPU each, all of this machine, connected: (the cluster, its workers)."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    def begin() -> tuple[Any, list[Any]]:
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=1, include_dashboard=False)
            nodes = [cluster.add_node(num_cpus=1) for _ in range(workers)]
            cluster.wait_for_nodes()
            ray.init(address=cluster.address, log_to_driver=False)
        except Exception:
            cluster.shutdown()
            raise
        return cluster, nodes

    ray.shutdown()
    cluster, nodes = tried(begin, ray)
    try:
        yield cluster, nodes
    finally:
        ray.shutdown()
        cluster.shutdown()
