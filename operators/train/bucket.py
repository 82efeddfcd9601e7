"""Trains a student whose folder is in a bucket: the workers of one node share a folder on its disk, which is mirrored.

Before an attempt, the node copies the contents of the bucket. During training it copies each complete checkpoint to the
bucket, its marker last, with the metrics of the steps; checkpoints that retention deletes are deleted there too. At the
end it copies the student, and last the file that says so. So an attempt on another node continues from the bucket.
"""

import json
import logging
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import ray
import torch.distributed as dist

from operators.files.atomic import put_file
from operators.files.copies import delete, files_below, pull, push
from operators.models import cache_folder
from operators.redact import without_credentials
from operators.train.job import CHECKPOINTS, EXPORTED, FAILED, RAY_TRAIN, TrainJob
from operators.train.loop import train_worker
from operators.train.metrics import METRICS
from operators.train.stopping import STOP, stop_is_asked

MARKER = "COMPLETE"
_LOG = logging.getLogger(__name__)
LOOK_S = 2.0  # seconds between two looks for a complete checkpoint


def train_from_bucket(settings: dict[str, TrainJob]) -> None:
    """The body of one Ray Train worker whose `job.folder` is in a bucket; see `loop.train_worker`."""
    with working_copy(settings["job"]) as job:
        train_worker({"job": job})


def working_folder(home: str) -> Path:
    """The folder on the node's disk in which a student in a bucket is trained."""
    return cache_folder() / "training" / sha256(home.encode()).hexdigest()[:32]


@contextmanager
def working_copy(job: TrainJob) -> Iterator[TrainJob]:
    """The job with a folder on the disk of this node; every worker must call this.

    Raises:
        ValueError: the workers are on several nodes, which share no folder.
    """
    folder, first = working_folder(job.folder), dist.get_rank() == 0
    try:
        _require_one_node()
        if first:
            shutil.rmtree(folder, ignore_errors=True)
            pull(job.folder, folder, lambda name: not name.startswith(f"{CHECKPOINTS}/{RAY_TRAIN}/"))
            (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        dist.barrier()
        mirror = Mirror(folder, job.folder) if first else None
        here = [str(folder / file.removeprefix(f"{job.folder}/")) for file in job.files]
        with mirror or nullcontext():
            yield replace(job, folder=str(folder), files=here)
    except ValueError as error:
        _tell(job, str(error))
        raise
    finally:
        failed = folder / CHECKPOINTS / FAILED
        if failed.is_file():  # every worker reports it, because the first one may be killed before its mirror ends
            _tell(job, str(json.loads(failed.read_text())["error"]))
    dist.barrier()
    if first:
        shutil.rmtree(folder)


def _require_one_node() -> None:
    nodes: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(nodes, ray.get_runtime_context().get_node_id())
    if len(set(nodes)) > 1:
        raise ValueError(
            f"train: {len(nodes)} workers are on {len(set(nodes))} nodes, and a student in a bucket is trained on one; "
            "lower train.num_workers, or give storage=<folder that all nodes share>"
        )


def _tell(job: TrainJob, error: str) -> None:
    """Store an error that would repeat, for the driver and restarted workers, with the paths that the user knows."""
    text = error.replace(str(working_folder(job.folder)), job.folder)
    put_file(f"{job.folder}/{CHECKPOINTS}/{FAILED}", json.dumps({"error": text}))


class Mirror(threading.Thread):
    """Copies the files that training writes on this disk to the bucket, while inside and at the end."""

    def __init__(self, folder: Path, home: str) -> None:
        super().__init__(daemon=True, name="mirror")
        self._folder, self._home = folder, home
        self._ended = threading.Event()
        there = files_below(f"{home}/{CHECKPOINTS}")
        self._there = {str(Path(name).parent) for name in there if Path(name).name == MARKER}

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        """Copy the rest: checkpoints, metrics, the student, and last the file that says that it is complete."""
        self._ended.set()
        self.join()
        self.look()
        names = [str(file.relative_to(self._folder)) for file in self._folder.rglob("*") if file.is_file()]
        push(self._folder, self._home, [name for name in names if not name.startswith(f"{CHECKPOINTS}/")])
        push(self._folder, self._home, [name for name in names if name == f"{CHECKPOINTS}/{EXPORTED}"])

    def run(self) -> None:
        """The thread's body: look at the disk regularly. A failed copy is tried again, the last time at the end."""
        told = ""
        while not self._ended.wait(LOOK_S):
            try:
                self.look()
            except Exception as error:  # noqa: BLE001 - training goes on; without a copy, a lost node costs progress
                words = without_credentials(" ".join(str(error).split()))[:300]
                if words != told:
                    _LOG.warning("train: %s is tried again: a checkpoint could not be copied: %s", self._home, words)
                told = words
            else:
                told = ""

    def look(self) -> None:
        """Copy newly completed checkpoints, delete those that were deleted here, and pass on a request to stop."""
        checkpoints = self._folder / CHECKPOINTS
        if stop_is_asked(self._home):
            (checkpoints / STOP).touch()
        here = {str(marker.parent.relative_to(checkpoints)) for marker in checkpoints.rglob(MARKER)}
        for name in sorted(here - self._there):
            self._push_checkpoint(checkpoints / name, f"{self._home}/{CHECKPOINTS}/{name}", name)
        for name in sorted(self._there - here):
            delete(f"{self._home}/{CHECKPOINTS}/{name}/{MARKER}")
            delete(f"{self._home}/{CHECKPOINTS}/{name}")
            self._there.discard(name)

    def _push_checkpoint(self, folder: Path, home: str, name: str) -> None:
        if (self._folder / METRICS).is_file():
            push(self._folder, self._home, [METRICS])
        try:
            push(folder, home, json.loads((folder / MARKER).read_text())["files"])
            push(folder, home, [MARKER])
        except FileNotFoundError:  # retention deleted it during the copy, because a newer one is complete
            delete(home)
            return
        self._there.add(name)
