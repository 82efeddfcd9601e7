"""Two runs on three nodes, each of which wants two whole nodes for its training workers.

python gangs.py FOLDER           starts the nodes and both runs, and ends with 0 when both have
python gangs.py FOLDER NAME      one of the runs
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NODES, CPUS, WORKERS = 3, 2, 2
LIMIT_S = 240.0


def together(job: dict[str, Any]) -> None:
    """A worker that needs the other: it meets it twice, and writes down where it was and when."""
    import ray
    import torch.distributed as dist

    dist.barrier()
    began = time.time()
    for _ in range(20):
        dist.barrier()
        time.sleep(0.05)  # work that lasts, so that runs that could overlap would
    found = {"node": ray.get_runtime_context().get_node_id(), "began": began, "ended": time.time()}
    Path(job["folder"], f"{job['name']}-{dist.get_rank()}.json").write_text(json.dumps(found))


def run(folder: str, name: str) -> None:
    import ray
    from ray.train.torch import TorchConfig, TorchTrainer

    from operators.train.config import TrainConfig
    from operators.train.train import scaling_of

    ray.init(log_to_driver=False)
    config = TrainConfig(num_workers=WORKERS, cpus_per_worker=CPUS)
    job = {"folder": folder, "name": name}
    TorchTrainer(
        together,
        train_loop_config=job,
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=scaling_of(config),
        run_config=ray.train.RunConfig(name=name, storage_path=folder),
    ).fit()


def main(folder: str) -> int:
    from ray._private import ray_constants
    from ray.cluster_utils import Cluster

    from cluster.local import LOOPBACK_ONLY, PATIENCE

    os.environ.update(PATIENCE | LOOPBACK_ONLY, RAY_TRAIN_V2_ENABLED="1")
    ray_constants.ENABLE_RAY_CLUSTER = False
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": 80_000_000, "include_dashboard": False},
    )
    try:
        for _ in range(NODES):
            cluster.add_node(num_cpus=CPUS, object_store_memory=80_000_000)
        environment = {**os.environ, "RAY_ADDRESS": cluster.address}
        runs = [subprocess.Popen([sys.executable, __file__, folder, name], env=environment) for name in ("a", "b")]
        return max(abs(one.wait(LIMIT_S)) for one in runs)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:]) if len(sys.argv) > 2 else main(sys.argv[1]))
