"""The mark of a storage, which tells it from the empty folder that is left where a file system is not mounted."""

import uuid
from pathlib import Path

from cluster.files import StorageError
from operators.files.places import in_bucket

MARK = ".storage"


def mark(storage: str) -> None:
    """Mark a folder as a storage, unless it is marked already."""
    path = Path(storage) / MARK
    if not path.exists():
        path.write_text(f"{uuid.uuid4().hex}\n")


def require_storage(storage: str) -> None:
    """Refuse a folder in which no run has worked yet. A bucket cannot be missing without an error.

    Raises:
        StorageError: it names the folder and the cure.
    """
    folder = Path(storage)
    if in_bucket(storage) or (folder / MARK).exists() or (folder / "assets").is_dir():  # older storages have no mark
        return
    raise StorageError(
        f"storage: {storage} is no storage yet (schedule.existing_storage); mount its file system, or make a new "
        "storage by a first run of the command line"
    )
