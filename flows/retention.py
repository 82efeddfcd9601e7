"""Deletes old students: each takes the disk space of its model, and daily refreshes train hundreds a year."""

from pyarrow import fs

from operators.evaluate.release_history import ReleaseHistory
from operators.files.atomic import open_filesystem
from operators.files.copies import delete, exists
from operators.train.result import MANIFEST

DELETED_STUDENTS = "deleted_students"  # of the metrics of the asset `release`
STUDENTS = "students"  # the folder below the storage that holds a folder for each student, named by its version


def has_weights(storage: str, version: str) -> bool:
    """Whether the folder of a student is still there."""
    return exists(f"{storage}/{STUDENTS}/{version}")


def prune_students(storage: str, keep: int, version: str) -> list[str]:
    """Delete all but the newest students. Their evaluations and the history of releases stay.

    Never deleted: the released student, the one that was released before it, the best one so far, and `version`. A
    student without a decision, whose training was given up, counts as older than all that have one.

    Args:
        storage: path or URI; the caller holds its lease.
        keep: number of students that stay besides those; 0 keeps all.
        version: of the student that was decided about last.

    Returns:
        The versions that were deleted, the oldest first.
    """
    if not keep:
        return []
    filesystem, root = open_filesystem(f"{storage}/{STUDENTS}")
    found = filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))
    history = ReleaseHistory(storage)
    decided = {decision.version: decision.number for decision in history.decisions()}
    current, best = history.current(), history.best()
    kept = {version, best.version if best else ""}
    kept |= {current.version, current.previous or ""} if current else set()
    others = [info.base_name for info in found if info.type == fs.FileType.Directory and info.base_name not in kept]
    others.sort(key=lambda name: (decided.get(name, 0), name))
    old = others[:-keep]
    for name in old:
        # Without this file the folder is no finished student, also if this process is killed before the next line.
        delete(f"{storage}/{STUDENTS}/{name}/{MANIFEST}")
        delete(f"{storage}/{STUDENTS}/{name}")
    return old
