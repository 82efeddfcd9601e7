"""configs/cluster.yaml on three simulated nodes: a head, one with the teacher's pool, one with the student's.

python pools.py FOLDER MODEL: runs it with a small model on CPUs; prints, as the last line, where each actor was.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
MEMORY_BYTES = 80_000_000  # of each node's object store


def settings(folder: str, model: str) -> list[str]:
    """Overrides: small models on CPUs, few rows. Where each stage runs is left as the file says."""
    teacher = ["backend=vllm", "device=cpu", "replicas=1", "tensor_parallel=1", "dtype=float32", "max_model_len=1536"]
    student = ["score.actors=1", "score.gpus_per_actor=0", "score.precision=fp32", "pack.tokenizers=1"]
    train = [
        "num_workers=2",
        "gpus_per_worker=0",
        "precision=fp32",
        "max_steps=1",
        "packs_per_step=2",
        "max_failures=0",
    ]
    return [
        *(f"storage={folder}/storage", f"source.path={folder}/source.json", "source.held_out_fraction=0.3"),
        *(f"teacher.{each}" for each in teacher),
        *(f"teacher.model={model}", f"student.model={model}", "reflect.max_tokens=16", "reflect.repair=false"),
        *(*student, "pack.max_tokens=256", "score.max_tokens=256", "select.keep_unreflected_responses=true"),
        *(f"train.{each}" for each in train),
        *("evaluate.judge=false", "evaluate.num_samples=1", "evaluate.max_new_tokens=2", "autoscaled=false"),
    ]


def main(folder: str, model: str) -> int:
    from ray._private import ray_constants
    from ray.cluster_utils import Cluster

    from cluster.local import LOOPBACK_ONLY, PATIENCE
    from cluster.runtime import patient_start

    os.environ.update(PATIENCE | LOOPBACK_ONLY, RAY_TRAIN_V2_ENABLED="1", PYTHONPATH=str(REPOSITORY))
    ray_constants.ENABLE_RAY_CLUSTER = False
    with patient_start():
        cluster: Any = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 3, "object_store_memory": MEMORY_BYTES, "include_dashboard": False},
        )
        for pool in ("teacher", "student"):
            cluster.add_node(num_cpus=2, object_store_memory=MEMORY_BYTES, resources={f"{pool}_pool": 1})
    import ray

    try:
        return run(cluster.address, settings(folder, model))
    finally:
        ray.shutdown()
        cluster.shutdown()


def run(address: str, overrides: list[str]) -> int:
    import ray

    from flows.launch import run_flow
    from flows.recycle_and_train import GRAPH

    ray.init(address, log_to_driver=False, logging_level="ERROR")
    arguments = ["--config", str(REPOSITORY / "configs/cluster.yaml"), *overrides]
    code = run_flow(GRAPH, arguments, (sys.stdout, sys.stderr))
    pools = {
        node["NodeID"]: next((name for name in node["Resources"] if name.endswith("_pool")), "head")
        for node in ray.nodes()
    }
    found: dict[str, set[str]] = {}
    for actor in ray._private.state.actors().values():
        found.setdefault(actor["ActorClassName"], set()).add(pools.get(actor["Address"]["NodeID"], ""))
    sys.stdout.write(json.dumps({name: sorted(places) for name, places in found.items()}) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
