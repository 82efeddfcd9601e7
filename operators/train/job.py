"""The job of a training worker, and the names of the files through which driver and workers communicate."""

import time
from dataclasses import dataclass, field

from operators.train.checkpoint import CheckpointSpec
from operators.train.config import TrainConfig

CHECKPOINTS, EXPORTED, FAILED = "checkpoints", "exported.json", "failed.json"
BEST = "best"  # below CHECKPOINTS: the weights with the lowest validation loss


@dataclass(frozen=True)
class TrainJob:
    """The job of all workers; `began` is the Unix time of the run's first attempt."""

    config: TrainConfig
    student: str
    folder: str
    files: list[str]
    digest: str
    identity: str
    began: float = field(default_factory=time.time)

    @property
    def spec(self) -> CheckpointSpec:
        """What its checkpoints belong to."""
        return CheckpointSpec(self.identity, self.config.num_workers, self.config.sharding)
