"""Deletes what killed processes left in a storage, and damaged files set aside long ago; nothing else is deleted here.

| what | when |
|---|---|
| `.<name>.<32 hexadecimal digits>.unfinished`: a file that its writer could not finish | after a day |
| `published.unfinished/`, `assets/.../.making/`: a publication, an asset that was not finished | after a day |
| `*.parquet.broken`, `*.parquet.discounted.broken`: damaged files (docs/operations.md) | after 30 days |

`*.parquet.discounted` is kept: the tokens of these failed calls were paid, and count for the budget.
"""

import re
import time
from collections.abc import Iterator

from pyarrow import fs

from cluster.storage import ASIDE
from operators.files.atomic import UNFINISHED, open_filesystem
from operators.parquet_log import BROKEN, DISCOUNTED, ENDING, UNFINISHED_S

SET_ASIDE_S = 30 * 24 * 3600
# Folders of a storage that are searched with all that is below them; of students only the files next to their models.
SEARCHED = ("assets", "ledger", "prompts", "scores", "evaluations", "releases", "refreshes", "reports")
_UNFINISHED = re.compile(rf"\..+\.[0-9a-f]{{32}}{re.escape(UNFINISHED)}")
_SET_ASIDE = (f"{ENDING}{BROKEN}", f"{ENDING}{DISCOUNTED}{BROKEN}")


def prune_leftovers(storage: str) -> list[str]:
    """Delete what the module names; returns the paths that were deleted, sorted.

    Args:
        storage: path or URI; the caller holds its lease and is writing nothing there.
    """
    filesystem, root = open_filesystem(storage)
    old = {info.path: info for info in _found(filesystem, root) if _is_old(info, root)}
    for path, info in old.items():
        if info.type == fs.FileType.Directory:
            filesystem.delete_dir(path)
        else:
            filesystem.delete_file(path)
    return sorted(old)


def _found(filesystem: fs.FileSystem, root: str) -> Iterator[fs.FileInfo]:
    top = filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))
    yield from top
    for info in top:
        if info.base_name in SEARCHED and info.type == fs.FileType.Directory:
            below = filesystem.get_file_info(fs.FileSelector(info.path, recursive=True))
            yield from (one for one in below if f"/{ASIDE}/" not in one.path)
        if info.base_name == "students" and info.type == fs.FileType.Directory:
            for student in filesystem.get_file_info(fs.FileSelector(info.path)):
                if student.type == fs.FileType.Directory:
                    yield from filesystem.get_file_info(fs.FileSelector(student.path))


def _is_old(info: fs.FileInfo, root: str) -> bool:
    age = time.time() - info.mtime_ns / 1e9 if info.mtime_ns else 0
    if info.type == fs.FileType.Directory:
        is_ours = info.path == f"{root}/published{UNFINISHED}" or (
            info.base_name == ASIDE and info.path.startswith(f"{root}/assets/")
        )
        return is_ours and age > UNFINISHED_S
    if info.base_name.endswith(_SET_ASIDE):
        return age > SET_ASIDE_S
    return _UNFINISHED.fullmatch(info.base_name) is not None and age > UNFINISHED_S
