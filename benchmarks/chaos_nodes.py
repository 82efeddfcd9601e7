"""The faults of chaos.py that need several nodes: a simulated cluster on this machine, of which one node is killed.

The head runs no task, as in the shipped manifests; three nodes of two CPUs do the work. The killed node's raylet and
workers end at once, as when a machine is lost, and a new node replaces it.
"""

import os
from collections.abc import Callable
from typing import Any

from ray._private import ray_constants

from benchmarks.chaos_life import Ended, Life
from benchmarks.chaos_ray import Driver
from cluster.local import LOOPBACK_ONLY, PATIENCE
from cluster.runtime import patient_start

NODES, CPUS = 3, 2
MEMORY_BYTES = 150_000_000  # of each node's object store
MOMENTS = {
    "reflection": "ledger/reflect_instructions/*.parquet",
    "training": "students/*/metrics.jsonl",
    "evaluation": "assets/student/*_SUCCESS",
}


def kill_node(stage: str) -> Callable[[Life], tuple[str, Ended]]:
    """A node is lost while a stage works."""

    def strike(life: Life) -> tuple[str, Ended]:
        from ray.cluster_utils import Cluster

        os.environ.update(PATIENCE | LOOPBACK_ONLY)
        ray_constants.ENABLE_RAY_CLUSTER = False  # the nodes listen on 127.0.0.1 alone, see cluster/runtime.py
        os.environ["RAY_TMPDIR"] = f"/tmp/c{os.getpid()}"  # noqa: S108 - no one else is to join by default
        with patient_start():
            cluster: Any = Cluster(
                initialize_head=True,
                head_node_args={"num_cpus": 0, "object_store_memory": MEMORY_BYTES, "include_dashboard": False},
            )
            life.nodes = cluster
            nodes = [cluster.add_node(num_cpus=CPUS, object_store_memory=MEMORY_BYTES) for _ in range(NODES)]
        life.environment = {"RAY_ADDRESS": cluster.address}
        life.settings += ["train.max_steps=6", "train.num_workers=2", "train.max_failures=3"]

        def act(_: Driver) -> bool:
            cluster.remove_node(life.random.choice(nodes), allow_graceful=False)
            with patient_start():
                cluster.add_node(num_cpus=CPUS, object_store_memory=MEMORY_BYTES)
            return True

        process, out = life.start()
        if life.await_moment(process, MOMENTS[stage]):
            life.struck = act(process)
        ended = life.finish(process, out)
        if ended.code != 0:
            life.wrong.append(f"the run ended with {ended.code}: {ended.text.strip().splitlines()[-1:]}")
        return "base", ended

    return strike


def give_nodes_back(life: Life) -> None:
    if life.nodes is not None:
        life.nodes.shutdown()
