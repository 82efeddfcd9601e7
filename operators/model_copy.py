"""Copies a model from a bucket to the disk of the node that loads it."""

import fcntl
import hashlib
import shutil
import time
from pathlib import Path

from operators.files.copies import files_below, pull
from operators.files.places import in_bucket
from operators.models import cache_folder

COPIES = "copies"  # below the cache
KEPT_S = 24 * 3600.0  # a copy that nobody asked for in this time is deleted when another is made
MARKER = ".complete"


def on_this_disk(model: str) -> str:
    """The path that transformers loads: `model` itself, or a local copy of it if it is `s3://bucket/...`.

    Each node makes one copy and keeps it for a day after its last use. Names, sizes and times of its files identify a
    copy, so a model that was written again under the same name gets a new one.
    """
    if not in_bucket(model):
        return model
    named = sorted((name, info.size, info.mtime_ns) for name, info in files_below(model).items() if "/" not in name)
    known = hashlib.sha256(repr((model, named)).encode()).hexdigest()[:32]
    copies = cache_folder() / COPIES
    copies.mkdir(parents=True, exist_ok=True)
    copy = copies / known
    with (copies / f"{known}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (copy / MARKER).is_file():
            _forget_old(copies)
            shutil.rmtree(copy, ignore_errors=True)
            pull(model, copy, lambda name: "/" not in name)
        (copy / MARKER).touch()
    return str(copy)


def _forget_old(copies: Path) -> None:
    for marker in copies.glob(f"*/{MARKER}"):
        if time.time() - marker.stat().st_mtime > KEPT_S:
            shutil.rmtree(marker.parent, ignore_errors=True)
            (copies / f"{marker.parent.name}.lock").unlink(missing_ok=True)
