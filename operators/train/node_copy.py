"""A node's copy of a training folder that is in a bucket: what its workers copy there, and what they fetch.

Each worker copies the files that it wrote itself. A checkpoint in the bucket counts when it has its marker, which the
first worker writes after all workers have copied their parts. Shards of other nodes are fetched only where a worker has
to read them: after the number of workers has changed.
"""

import hashlib
import hmac
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from operators.files.atomic import put_file
from operators.files.copies import delete, files_below, pull, push, read_text
from operators.redact import without_credentials
from operators.train.checkpoint import MARKER, Checkpoint, CheckpointSpec, gathered, leads, rank, world_size, write_json
from operators.train.metrics import METRICS

RETRY_S = 2.0  # between two tries to write to the bucket
PATIENCE_S = 60.0  # for which training waits, at a checkpoint or the end, for a bucket that cannot be written
KEY_VARIABLE = "RECYCLE_CHECKPOINT_KEY"  # environment of the nodes: a secret that those who write to the bucket lack
SIGNATURE = "signature"  # of a marker in the bucket, if there is such a key
_LOG = logging.getLogger(__name__)
_STEP = re.compile(r"step-\d+")
_OF_A_WORKER = re.compile(r"zero_pp_rank_(\d+)_")  # in DeepSpeed's names of shards


@dataclass(frozen=True)
class NodeCopy:
    """A folder on the disk of this node that holds what its workers need of one in a bucket.

    Attributes:
        folder: on the disk.
        home: in the bucket.
        mates: ranks of the workers on this node, in order.
        known: checkpoints that were in the bucket when the attempt began, as paths below `home`.
    """

    folder: Path
    home: str
    mates: tuple[int, ...]
    known: frozenset[str] = frozenset()

    def there(self, path: Path) -> str:
        """Where a path below the folder is in the bucket."""
        inside = path.relative_to(self.folder).as_posix()
        return self.home if inside == "." else f"{self.home}/{inside}"

    def push(self, folder: Path, names: Iterable[str]) -> None:
        """Copy files of a folder below this one to the bucket."""
        push(folder, self.there(folder), names)

    def committed(self, checkpoints: Path) -> list[Checkpoint]:
        """The checkpoints with a marker in the bucket, oldest first, the same for all; every worker must call this."""
        markers = _markers(self.there(checkpoints)) if rank() == 0 else []
        return [
            Checkpoint(checkpoints / name, marker["step"], CheckpointSpec(**marker["spec"]), self.mates)
            for name, marker in gathered(markers)[0]
        ]

    def fetch(self, checkpoint: Checkpoint) -> None:
        """Copy what the workers of this node need of a checkpoint and do not have; every worker must call this.

        The marker on this disk names only these files.
        """
        if leads(self.mates):
            folder, place = checkpoint.folder, self.there(checkpoint.folder)
            whole = json.loads(read_text(f"{place}/{MARKER}") or "")
            here = json.loads((folder / MARKER).read_text()) if (folder / MARKER).is_file() else {"digests": {}}
            needed = [name for name in whole["files"] if _is_needed(name, checkpoint.spec, self.mates)]
            genuine = is_genuine(whole)
            if not genuine:
                _LOG.warning("train: the marker of %s is not signed with %s; it is not read", place, KEY_VARIABLE)
            digests = whole.get("digests", {}) if genuine else {}  # without them, `damage` refuses the checkpoint
            missing = {name for name in needed if here["digests"].get(name) != digests.get(name)}
            pull(place, folder, missing.__contains__)
            for part, found in (("files", whole["files"]), ("digests", digests)):
                whole[part] = {name: found[name] for name in needed if name in found}
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / MARKER, whole)
        if dist.is_initialized():
            dist.barrier()

    def forget(self, folder: Path) -> None:
        """Delete a checkpoint of an earlier attempt that is made again, because it was damaged or not continued."""
        if folder.relative_to(self.folder).as_posix() in self.known:
            delete_checkpoint(self.there(folder))

    def commit(self, folder: Path, marker: dict[str, Any], keep: int) -> None:
        """Make a checkpoint count, after all workers have copied their parts; only the first worker calls this.

        Args:
            folder: of the checkpoint.
            marker: its content, for the files of all workers.
            keep: number of complete checkpoints to keep in the bucket, with this one; older ones are deleted.
        """
        if (self.folder / METRICS).is_file():
            push(self.folder, self.home, [METRICS])
        put_file(f"{self.there(folder)}/{MARKER}", json.dumps(signed(marker), indent=1))
        beside = self.there(folder.parent)
        names = {name for name in files_below(beside) if _STEP.match(name) and name.split("/")[0] <= folder.name}
        steps = {name.split("/")[0] for name in names}
        complete = sorted(step for step in steps if f"{step}/{MARKER}" in names)
        for step in steps.difference(complete[-keep:]):
            delete_checkpoint(f"{beside}/{step}")


def signed(marker: dict[str, Any]) -> dict[str, Any]:
    """The marker with its signature; unchanged if there is no key.

    The marker has the digests of all files, so whoever lacks the key cannot exchange a shard, which is a pickle.
    """
    signature = _signature(marker)
    return {**marker, SIGNATURE: signature} if signature else marker


def is_genuine(marker: dict[str, Any]) -> bool:
    """Whether a marker from the bucket was written with our key; always, if there is no key."""
    expected = _signature({name: value for name, value in marker.items() if name != SIGNATURE})
    return not expected or hmac.compare_digest(expected, str(marker.get(SIGNATURE, "")))


def _signature(marker: dict[str, Any]) -> str:
    key = os.environ.get(KEY_VARIABLE, "")
    return (
        hmac.new(key.encode(), json.dumps(marker, sort_keys=True).encode(), hashlib.sha256).hexdigest() if key else ""
    )


def delete_checkpoint(place: str) -> None:
    """Delete a checkpoint in a bucket, its marker first, so that what is left does not count."""
    delete(f"{place}/{MARKER}")
    delete(place)


def checkpoint_of(name: str) -> str:
    """The folder of the checkpoint to which a file below a training folder belongs; "" if to none."""
    parts = Path(name).parts
    place = next((number for number, part in enumerate(parts[:-1]) if _STEP.fullmatch(part)), None)
    return "" if place is None else "/".join(parts[: place + 1])


def persistently(act: Callable[[], None], hurry: threading.Event, home: str) -> str:
    """Try again until it succeeds, or until it still fails `PATIENCE_S` after `hurry` was set.

    Args:
        act: writes to the bucket.
        hurry: set when something waits for it.
        home: what the log says is tried again.

    Returns:
        "", or why it was given up, without credentials.
    """
    told, end = "", float("inf")
    while True:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - training goes on; without a copy, a lost node costs progress
            words = str(without_credentials(" ".join(str(error).split())))[:300]
        else:
            return ""
        if words != told:
            _LOG.warning("train: %s is tried again: it could not be written: %s", home, words)
        told, now = words, time.monotonic()
        if hurry.is_set():
            end = min(end, now + PATIENCE_S)
            if now >= end:
                return words
            time.sleep(RETRY_S)
        else:
            hurry.wait(RETRY_S)


def _markers(place: str) -> list[tuple[str, dict[str, Any]]]:
    """Name and content of the marker of each checkpoint below a place, oldest first."""
    names = sorted(name for name in files_below(place) if re.fullmatch(rf"{_STEP.pattern}/{MARKER}", name))
    return [(name.split("/")[0], json.loads(read_text(f"{place}/{name}") or "")) for name in names]


def _is_needed(name: str, spec: CheckpointSpec, mates: Sequence[int]) -> bool:
    """Whether these workers read a file of a checkpoint; if their number has changed, each node converts all of it."""
    owner = _OF_A_WORKER.search(name)
    return owner is None or spec.world_size != world_size() or int(owner[1]) in mates
