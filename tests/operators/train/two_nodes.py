"""A training into a bucket on two nodes that share no folder. One worker is killed once, while it copies its part.

python two_nodes.py FOLDER PACKS MODEL HOME     trains into HOME; FOLDER/result.json gets what `train` returned, and
                                                FOLDER/killed.json what the bucket and the disks held at the kill
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from operators.train.config import TrainConfig
from operators.train.job import TrainJob

CPUS = 2  # of a node
KILLED_AT = 6  # the step after which the checkpoint is saved
BEST_AT = 4  # the step with the lowest validation loss
CONFIG = TrainConfig(
    num_workers=2, cpus_per_worker=CPUS, threads_per_worker=1, max_failures=1, max_steps=8, packs_per_step=5,
    learning_rate=1e-3, precision="fp32", checkpoint_every_steps=2, evaluate_every_steps=2, validation_share=0.1,
)  # fmt: skip


def validation_losses(trainer: Any) -> dict[str, float]:
    """In place of `Trainer.evaluate`: the weights of one step are the best, in every attempt."""
    return dict.fromkeys(("validation_loss", "quiet_loss"), 1.0 + abs(trainer._engine.global_steps - BEST_AT))


def await_files(place: str) -> set[str]:
    """The names of the files of a place in a bucket, once there are some."""
    from operators.files.copies import files_below

    end = time.monotonic() + 120
    while not (found := set(files_below(place))):
        assert time.monotonic() < end, f"nothing is in {place}"
        time.sleep(0.05)
    return found


def worker(settings: dict[str, TrainJob], folder: str) -> None:
    """The training worker. That of the second node is killed when the other part of a checkpoint is in the bucket."""
    import torch.distributed as dist

    from operators.train import bucket, node_copy
    from operators.train.trainer import Trainer

    push, killed = node_copy.push, Path(folder, "killed.json")

    def cut_off(disk: Path, place: str, names: Iterable[str]) -> None:
        if dist.get_rank() == 1 and place.endswith(f"checkpoints/step-{KILLED_AT:08}") and not killed.exists():
            here = sorted(file.relative_to(disk.parent).as_posix() for file in disk.parent.rglob("*.pt"))
            killed.write_text(json.dumps({"bucket": sorted(await_files(place)), "disk": str(disk), "here": here}))
            os.kill(os.getpid(), signal.SIGKILL)
        push(disk, place, names)

    node_copy.push = cut_off
    Trainer.evaluate = validation_losses  # type: ignore[method-assign]
    bucket.train_from_bucket(settings)


def main(folder: str, packs: str, model: str, home: str) -> int:
    from cluster.local import LOOPBACK_ONLY, PATIENCE
    from cluster.runtime import patient_start

    os.environ.update(PATIENCE | LOOPBACK_ONLY, RAY_TRAIN_V2_ENABLED="1")
    import ray
    from ray._private import ray_constants
    from ray.cluster_utils import Cluster

    from operators.train import train

    ray_constants.ENABLE_RAY_CLUSTER = False
    small = {"object_store_memory": 80_000_000}
    with patient_start():
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
        for number in range(2):
            cluster.add_node(num_cpus=CPUS, env_vars={"RECYCLE_CACHE": f"{folder}/disk-{number}"}, **small)
    try:
        ray.init(cluster.address, log_to_driver=False)
        train.run_worker = lambda settings: worker(settings, folder)
        result = train.train(ray.data.read_parquet(packs), CONFIG, model, home)
        (Path(folder) / "result.json").write_text(result.model_dump_json())
        return 0
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
