"""Deletes old students: each takes as much disk space as its model, and daily refreshes train hundreds per year."""

import re

from pyarrow import fs

from flows.student_files import CHECKPOINTS
from operators.evaluate.release_history import ReleaseHistory
from operators.files.atomic import open_filesystem
from operators.files.copies import delete, exists
from operators.train.result import MANIFEST

DELETED_STUDENTS = "deleted_students"  # key in the metrics of the asset `release`
STUDENTS = "students"  # folder in the storage with one folder per student, named by its version
OURS = (CHECKPOINTS, "start.json", MANIFEST)  # what a training leaves in its student's folder, finished or not
_VERSION = re.compile(r"[0-9a-f]{16}")  # the form of a fingerprint; a folder of another name is a person's


def has_weights(storage: str, version: str) -> bool:
    """Whether a student is finished and its model is there; a deletion that was cut off leaves only a part of both."""
    filesystem, root = open_filesystem(f"{storage}/{STUDENTS}/{version}")
    names = {info.base_name for info in filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))}
    model = names & {"config.json", "adapter_config.json"} and any(name.endswith(".safetensors") for name in names)
    return MANIFEST in names and bool(model)


def prune_students(storage: str, keep: int, version: str) -> list[str]:
    """Delete all but the newest students. Their evaluations and the history of releases stay.

    The released student, the one released before it, the best one so far, and `version` are never deleted. A student
    without a decision, because its training was given up, counts as older than all others. A folder that no training of
    this storage made, such as a copy of a student, is never deleted.

    Args:
        storage: path or URI; the caller holds its lease.
        keep: number of students to keep besides those; 0 keeps all.
        version: the student of the latest decision.

    Returns:
        The deleted versions, oldest first.
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
    names = [info.base_name for info in found if info.type == fs.FileType.Directory and info.base_name not in kept]
    others = [
        name
        for name in names
        if _VERSION.fullmatch(name)
        and (name in decided or any(exists(f"{storage}/{STUDENTS}/{name}/{file}") for file in OURS))
    ]
    others.sort(key=lambda name: (decided.get(name, 0), name))
    old = others[:-keep]
    for name in old:
        # Without this file the folder is not a finished student, even if this process is killed before the next line.
        delete(f"{storage}/{STUDENTS}/{name}/{MANIFEST}")
        delete(f"{storage}/{STUDENTS}/{name}")
    return old
