"""One run at a time on one storage."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from cluster.bucket_lease import LOST_AFTER_S, StorageBusyError, bucket_lease, is_bucket_leased
from cluster.storage_mark import mark
from operators.files.places import in_bucket

__all__ = ["LOST_AFTER_S", "StorageBusyError", "is_leased", "lease"]

LEASE = ".lease"
LOOKER_S, LOOKS = 0.01, 500  # seconds that a writer waits for readers, and how often


@contextmanager
def lease(storage: str, lost_after_s: float = LOST_AFTER_S) -> Iterator[None]:
    """Hold the storage while inside.

    For a folder this is a lock, which the kernel releases when the process ends, in whatever way; for a bucket it is an
    object that is renewed, see `cluster.bucket_lease`.

    Args:
        storage: a POSIX folder, or `s3://bucket/prefix`.
        lost_after_s: for a bucket: time without renewal after which another run may take over.

    Raises:
        StorageBusyError: another process holds it.
        StorageError: the bucket cannot be asked.
    """
    if in_bucket(storage):
        with bucket_lease(storage, lost_after_s):
            yield
        return
    Path(storage).mkdir(parents=True, exist_ok=True)
    mark(storage)
    # Both ways, because NFS refuses a shared lock (`_hold`) on a file that is open for writing only.
    with (Path(storage) / LEASE).open("a+") as file:
        if not _hold(file):
            raise StorageBusyError(f"storage: another run is writing to {storage}; wait for it or stop it")
        yield


def is_leased(storage: str) -> bool:
    """Whether another process holds the storage at this moment; nothing is written.

    Raises:
        StorageError: the bucket cannot be asked.
    """
    if in_bucket(storage):
        return is_bucket_leased(storage)
    path = Path(storage) / LEASE
    if not path.is_file():
        return False
    with path.open() as file:
        return not _locked(file, fcntl.LOCK_SH)


def _hold(file: TextIO) -> bool:
    """Lock the file for writing; False if another process writes.

    A process that only checks, as `is_leased` does, holds a shared lock for a moment. This must not refuse a run, so
    this function waits for it.
    """
    for _ in range(LOOKS):
        if _locked(file, fcntl.LOCK_EX):
            return True
        if not _locked(file, fcntl.LOCK_SH):
            return False
        fcntl.flock(file, fcntl.LOCK_UN)
        time.sleep(LOOKER_S)
    return False


def _locked(file: TextIO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
