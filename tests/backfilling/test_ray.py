from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import fct
from tests.backfilling.conftest import contents

ray = pytest.importorskip("ray")


@pytest.mark.slow
def test_a_node_killed_in_the_middle_changes_no_byte(
    gallery: Callable[..., Path], h: fct.Transformation, tmp_path: Path
) -> None:
    from ray.cluster_utils import Cluster

    source = gallery(30000, bad=(17,))
    options = {"progress": False, "shard_rows": 300, "batch_rows": 64}
    fct.backfill(source, tmp_path / "plain", h, **options)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        workers = [cluster.add_node(num_cpus=1) for _ in range(2)]
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        done = tmp_path / "new/_fct/done"
        left: list[int] = []

        def kill() -> None:
            while not done.is_dir() or len(list(done.glob("[0-9]*.json"))) < 5:
                time.sleep(0.005)
            cluster.remove_node(workers[0], allow_graceful=False)
            left.append(len(list(done.glob("[0-9]*.json"))))

        killer = threading.Thread(target=kill)
        killer.start()
        report = fct.backfill(source, tmp_path / "new", h, ray=cluster.address, **options)
        killer.join()
        assert left[0] < report.shards, "the node was killed too late"
        assert (report.rows_in, report.rejects) == (30000, 1)
        assert contents(tmp_path / "new") == contents(tmp_path / "plain")
        assert fct.verify_gallery(tmp_path / "new").ok
    finally:
        ray.shutdown()
        cluster.shutdown()
