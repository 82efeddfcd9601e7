"""One run at a time on one storage."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class StorageBusyError(RuntimeError):
    """Another run is writing to the storage; the command line shows it as one line."""


@contextmanager
def lease(storage: str) -> Iterator[None]:
    """Hold the storage while inside; the kernel gives it back when the process ends, however it ends.

    Only a local or shared POSIX folder can be leased; on an object store Dagster's queue keeps runs apart.

    Raises:
        StorageBusyError: another process holds it.
    """
    if "://" in storage:
        yield
        return
    Path(storage).mkdir(parents=True, exist_ok=True)
    with (Path(storage) / ".lease").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageBusyError(f"storage: another run is writing to {storage}; wait for it or stop it") from None
        yield
