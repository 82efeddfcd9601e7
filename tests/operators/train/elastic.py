"""An elastic training on two nodes, one of which is lost while both have a worker.

python elastic.py FOLDER PACKS MODEL [drained]

It trains into FOLDER/student; FOLDER/result.json gets what `train` returned. With `drained`, Ray is told that the node
is to be taken, there is no checkpoint but for that reason, and the node is lost when it is complete.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

CPUS, LOST_AFTER = 2, 3  # of a node; the step
MANY_STEPS = 150  # so that the training is not over before the node is drained
LIMIT_S = 200.0


def wait_until(reached: Callable[[], Any]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not reached():
        if time.monotonic() > deadline:
            os._exit(3)
        time.sleep(0.005)


def lose(cluster: Any, node: Any, student: Path, drained: bool) -> None:
    """Kill a node with all its processes once the training is at the step; nothing is trained meanwhile."""
    import psutil

    from operators.train.checkpoint import complete_checkpoints
    from operators.train.metrics import read_metrics

    metrics = student / "metrics.jsonl"
    wait_until(lambda: (lines := read_metrics(metrics)) and lines[-1]["step"] >= LOST_AFTER)
    if drained:
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
        ray = str(Path(sys.executable).with_name("ray"))
        command = [ray, "drain-node", "--address", cluster.address, "--node-id", node.node_id, *reason]
        if subprocess.run([*command, "--deadline-remaining-seconds", "600"]).returncode:
            os._exit(4)
        wait_until(lambda: complete_checkpoints(student / "checkpoints"))
    lines = read_metrics(metrics)
    os.kill(lines[-1]["pid"], signal.SIGSTOP)
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    below = raylet.children(recursive=True)
    cluster.remove_node(node, allow_graceful=False)
    for process in below:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    with suppress(ProcessLookupError):
        os.kill(lines[-1]["pid"], signal.SIGCONT)


def main(folder: str, packs: str, model: str, how: str = "") -> int:
    # A group of two is tried until Ray's coordinator has noticed, within 20 s, that a node is gone.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "2"
    os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "0.5"
    from cluster.local import LOOPBACK_ONLY, PATIENCE
    from cluster.runtime import patient_start

    os.environ.update(PATIENCE | LOOPBACK_ONLY, RAY_TRAIN_V2_ENABLED="1")
    import ray
    from ray._private import ray_constants
    from ray.cluster_utils import Cluster

    from operators.train.train import train
    from tests.operators.train.test_train import CONFIG

    ray_constants.ENABLE_RAY_CLUSTER = False
    small = {"object_store_memory": 80_000_000}
    with patient_start():
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
        nodes = [cluster.add_node(num_cpus=CPUS, **small) for _ in range(2)]
    try:
        ray.init(cluster.address, log_to_driver=False)
        changes = {"num_workers": 2, "min_workers": 1, "cpus_per_worker": CPUS, "max_failures": 2}
        changes |= {"max_steps": MANY_STEPS} if how == "drained" else {"checkpoint_every_steps": 2}
        config = CONFIG.model_copy(update=changes)
        student = Path(folder) / "student"
        threading.Thread(target=lose, args=(cluster, nodes[1], student, how == "drained"), daemon=True).start()
        result = train(ray.data.read_parquet(packs), config, model, str(student))
        (Path(folder) / "result.json").write_text(result.model_dump_json())
        return 0
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
