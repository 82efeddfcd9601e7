"""One run at a time on one storage."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LEASE = ".lease"


class StorageBusyError(RuntimeError):
    """Another run is writing to the storage; the command line shows it as one line."""


@contextmanager
def lease(storage: str) -> Iterator[None]:
    """Hold the storage, a POSIX folder, while inside; the kernel gives it back when the process ends, however it ends.

    Raises:
        StorageBusyError: another process holds it.
    """
    Path(storage).mkdir(parents=True, exist_ok=True)
    with (Path(storage) / LEASE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageBusyError(f"storage: another run is writing to {storage}; wait for it or stop it") from None
        yield


def is_leased(storage: str) -> bool:
    """Whether another process holds the storage at this moment; nothing is written."""
    path = Path(storage) / LEASE
    if not path.is_file():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
