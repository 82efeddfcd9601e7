"""Trains a student whose folder is in a bucket: each node has a copy on its disk of what its workers need.

Before an attempt, each node fetches the packs and the newest good checkpoint, of which it needs only the shards of its
own workers if their number is the same. During training, workers copy checkpoints to the bucket (see `saving`). At the
end the first worker copies the student, and last the file that says so. So an attempt on other nodes, or on another
number of them, continues from the bucket.
"""

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import ray
import torch.distributed as dist

from operators.files.atomic import put_file
from operators.files.copies import files_below, pull, push
from operators.models import cache_folder
from operators.train.checkpoint import MARKER, gathered, leads, patient_group, rank
from operators.train.job import CHECKPOINTS, EXPORTED, FAILED, RAY_TRAIN, TrainJob
from operators.train.loop import train_worker
from operators.train.metrics import METRICS
from operators.train.node_copy import NodeCopy, checkpoint_of, delete_checkpoint, persistently
from operators.train.stopping import STOP, stop_is_asked

NODE = f"{CHECKPOINTS}/node"  # below a working folder: Ray's id of the node that made it
LOOK_S = 2.0  # seconds between two looks for a request to stop


def train_from_bucket(settings: dict[str, TrainJob]) -> None:
    """The body of one Ray Train worker whose `job.folder` is in a bucket; see `loop.train_worker`."""
    with working_copy(settings["job"]) as job:
        train_worker({"job": job})


def working_folder(home: str, node: int = 0) -> Path:
    """The folder on a node's disk in which a student in a bucket is trained; nodes that share a disk have one each."""
    name = sha256(home.encode()).hexdigest()[:32]
    return cache_folder() / "training" / (f"{name}-{node}" if node else name)


@contextmanager
def working_copy(job: TrainJob) -> Iterator[TrainJob]:
    """The job with a folder on the disk of this node; every worker must call this."""
    nodes = gathered(str(ray.get_runtime_context().get_node_id()))
    number, mates = _place_of(nodes)
    folder, first = working_folder(job.folder, number), rank() == 0
    try:
        if leads(mates):
            _clear(job.folder, nodes)
        names, known = gathered(_opened(job.folder) if first else None)[0]  # the same for all, whatever changes there
        if leads(mates):
            (folder / CHECKPOINTS).mkdir(parents=True)
            (folder / NODE).write_text(nodes[rank()])
            pull(job.folder, folder, names.__contains__)
        dist.barrier()
        copy = NodeCopy(folder, job.folder, mates, known)
        here = [str(folder / file.removeprefix(f"{job.folder}/")) for file in job.files]
        with patient_group() as group:
            with _attended(copy) if first else nullcontext():
                yield replace(job, folder=str(folder), files=here, copy=copy)
            gathered(None, group)  # until the first worker has copied the student
    except ValueError as error:
        _tell(job, folder, str(error))
        raise
    finally:
        failed = folder / CHECKPOINTS / FAILED
        if failed.is_file():  # every worker reports it, because the others are killed once one has ended
            _tell(job, folder, str(json.loads(failed.read_text())["error"]))
    if leads(mates):
        shutil.rmtree(folder)


def _place_of(nodes: list[str]) -> tuple[int, tuple[int, ...]]:
    """Number of this worker's node, in the order of their first workers, and the ranks on it."""
    own = nodes[rank()]
    return list(dict.fromkeys(nodes)).index(own), tuple(mate for mate, node in enumerate(nodes) if node == own)


def _clear(home: str, nodes: list[str]) -> None:
    """Remove what earlier attempts left on this disk; what other nodes that share it left, they remove themselves."""
    first = working_folder(home)
    for left in first.parent.glob(f"{first.name}*"):
        owner = (left / NODE).read_text() if (left / NODE).is_file() else ""
        if owner not in nodes or owner == nodes[rank()]:
            shutil.rmtree(left, ignore_errors=True)


def _opened(home: str) -> tuple[set[str], frozenset[str]]:
    """What is fetched at once, and the checkpoints; what killed attempts left of unfinished ones is deleted."""
    names = [name for name in files_below(home) if not name.startswith(f"{CHECKPOINTS}/{RAY_TRAIN}/")]
    complete = frozenset(checkpoint_of(name) for name in names if Path(name).name == MARKER)
    for unfinished in sorted({checkpoint_of(name) for name in names} - complete - {""}):
        delete_checkpoint(f"{home}/{unfinished}")
    # Other files beside the metrics are of an export that was cut off.
    return {name for name in names if not checkpoint_of(name) and ("/" in name or name == METRICS)}, complete


@contextmanager
def _attended(copy: NodeCopy) -> Iterator[None]:
    """The first worker's: pass on a request to stop, and at the end copy metrics and student to the bucket.

    Raises:
        RuntimeError: they could not be copied; another attempt may succeed.
    """
    ended = threading.Event()
    watch = threading.Thread(target=_pass_on_stop, args=(copy, ended), daemon=True, name="stop")
    watch.start()
    try:
        yield
    except BaseException:
        with suppress(Exception):  # metrics show what happened before the error, which counts more than this one
            _push_results(copy)
        raise
    finally:
        ended.set()
        watch.join()
    hurry = threading.Event()
    hurry.set()
    if problem := persistently(lambda: _push_results(copy), hurry, copy.home):
        raise RuntimeError(f"train: the student could not be copied to {copy.home}: {problem}")


def _pass_on_stop(copy: NodeCopy, ended: threading.Event) -> None:
    while not ended.wait(LOOK_S):
        with suppress(OSError):
            if stop_is_asked(copy.home):
                (copy.folder / CHECKPOINTS / STOP).touch()


def _push_results(copy: NodeCopy) -> None:
    """Copy all that is not a checkpoint, and last the file that says that the student is complete."""
    names = (file.relative_to(copy.folder).as_posix() for file in copy.folder.rglob("*") if file.is_file())
    push(copy.folder, copy.home, [name for name in names if not name.startswith(f"{CHECKPOINTS}/")])
    exported = copy.folder / CHECKPOINTS / EXPORTED
    if exported.is_file():
        put_file(f"{copy.home}/{CHECKPOINTS}/{EXPORTED}", _as_known(exported.read_text(), copy.folder, copy.home))


def _tell(job: TrainJob, folder: Path, error: str) -> None:
    """Store an error that would repeat, for the driver and restarted workers."""
    put_file(f"{job.folder}/{CHECKPOINTS}/{FAILED}", json.dumps({"error": _as_known(error, folder, job.folder)}))


def _as_known(text: str, folder: Path, home: str) -> str:
    """A text with the place that the user knows instead of the folder on this disk."""
    return text.replace(str(folder), home)
