"""The job of a training worker, and the names of the files through which driver and workers communicate.

The driver imports this module and nothing that only workers need: transformers takes seconds to import.
"""

import time
from dataclasses import dataclass, field

from operators.files.places import in_bucket
from operators.train.checkpoint import CheckpointSpec
from operators.train.config import TrainConfig
from operators.train.node_copy import NodeCopy

CHECKPOINTS, EXPORTED, FAILED = "checkpoints", "exported.json", "failed.json"
PACKS, RAY_TRAIN = "packs", "ray_train"  # below CHECKPOINTS
BEST = "best"  # below CHECKPOINTS: the weights with the lowest validation loss


@dataclass(frozen=True)
class TrainJob:
    """The job of all workers.

    Attributes:
        began: Unix time of the run's first attempt.
        copy: if `folder` is this node's copy of one in a bucket.
        chat_template: text that is exported instead of the student's own template; "" exports that.
    """

    config: TrainConfig
    student: str
    folder: str
    files: list[str]
    digest: str
    identity: str
    began: float = field(default_factory=time.time)
    copy: NodeCopy | None = None
    chat_template: str = ""

    @property
    def spec(self) -> CheckpointSpec:
        """What its checkpoints belong to."""
        return CheckpointSpec(self.identity, self.config.num_workers, self.config.sharding)


def run_worker(settings_of_run: dict[str, TrainJob]) -> None:
    """The body of one Ray Train worker; see `loop.train_worker`, and `bucket.train_from_bucket` for a bucket."""
    if in_bucket(settings_of_run["job"].folder):
        from operators.train.bucket import train_from_bucket

        train_from_bucket(settings_of_run)
        return
    from operators.train.loop import train_worker

    train_worker(settings_of_run)
