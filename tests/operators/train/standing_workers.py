"""Training workers that stay, in place of Ray Train's: a run after the first starts no process and imports nothing."""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import ray
import torch

Loop = Callable[[dict[str, Any]], None]


class _Worker:
    """The actor's body: one process of a gloo group, as a worker of Ray Train is."""

    def __init__(self, rank: int, size: int, meeting: str) -> None:
        os.environ["LOCAL_RANK"] = str(rank)
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)

    def train(self, loop: Loop, settings: dict[str, Any]) -> None:
        loop(settings)


def start_workers(size: int, meeting: str) -> list[Any]:
    """A gloo group of `size` actors; `meeting` is a file that is not there yet."""
    actor: Any = ray.remote(num_cpus=0.5)(_Worker)
    return [actor.remote(rank, size, meeting) for rank in range(size)]


def trainer_of(workers: list[Any]) -> Callable[..., SimpleNamespace]:
    """What `train` calls as `TorchTrainer`: its run is done by these workers, or by this process if there are none."""

    def trainer(loop: Loop, train_loop_config: dict[str, Any], scaling_config: Any, **_: Any) -> SimpleNamespace:
        assert scaling_config.num_workers == max(1, len(workers))

        def fit() -> None:
            if not workers:
                loop(train_loop_config)
            ray.get([worker.train.remote(loop, train_loop_config) for worker in workers])

        return SimpleNamespace(fit=fit)

    return trainer
