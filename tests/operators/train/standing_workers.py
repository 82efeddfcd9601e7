"""Permanent training workers in place of those of Ray Train, so that later runs start no process and import nothing."""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import ray
import torch

Loop = Callable[[dict[str, Any]], None]


class _Worker:
    """The class of the actors: one process of a gloo group, like a worker of Ray Train."""

    def __init__(self, rank: int, size: int, meeting: str) -> None:
        os.environ["LOCAL_RANK"] = str(rank)
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)

    def train(self, loop: Loop, settings: dict[str, Any]) -> None:
        loop(settings)


def start_workers(size: int, meeting: str) -> list[Any]:
    """A gloo group of `size` actors, which meet through the file `meeting`; it must not exist yet."""
    actor: Any = ray.remote(num_cpus=0.5)(_Worker)
    return [actor.remote(rank, size, meeting) for rank in range(size)]


def trainer_of(workers: list[Any]) -> Callable[..., SimpleNamespace]:
    """A replacement for `TorchTrainer` in `train` that runs on these workers, or in this process if there are none."""

    def trainer(loop: Loop, train_loop_config: dict[str, Any], scaling_config: Any, **_: Any) -> SimpleNamespace:
        assert scaling_config.num_workers == max(1, len(workers))

        def fit() -> None:
            if not workers:
                loop(train_loop_config)
            ray.get([worker.train.remote(loop, train_loop_config) for worker in workers])

        return SimpleNamespace(fit=fit)

    return trainer
