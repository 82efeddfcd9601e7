"""Files and folders that appear whole or not at all, on any file system that pyarrow knows."""

import os
import uuid
from pathlib import Path

from pyarrow import fs

UNFINISHED = ".unfinished"


def put_file(path: str, content: str | bytes) -> None:
    """Write a file whole: readers see what was there before or all of `content`.

    Locally it is written beside, flushed to disk and renamed; on an object store a PUT is atomic.

    Args:
        path: absolute path or URI; its folder need not exist.
        content: text is written as UTF-8.
    """
    filesystem, inside = fs.FileSystem.from_uri(path)
    raw = content.encode() if isinstance(content, str) else content
    filesystem.create_dir(inside.rpartition("/")[0])
    if not isinstance(filesystem, fs.LocalFileSystem):
        with filesystem.open_output_stream(inside) as stream:
            stream.write(raw)
        return
    target = Path(inside)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}{UNFINISHED}")
    try:
        with beside.open("wb") as stream:
            stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def swap_folder(filesystem: fs.FileSystem, beside: str, target: str, last: str) -> None:
    """Put the finished folder `beside` in the place of `target`; what was there is gone afterwards.

    Locally two renames. An object store has no folders: the new files move one by one under names that the old ones do
    not have, `last` moves last, and only then the old files are deleted.

    Args:
        filesystem: of both folders.
        beside: a finished folder.
        target: the folder to replace; need not exist.
        last: a file of `beside` whose arrival says that all others are there.
    """
    if isinstance(filesystem, fs.LocalFileSystem):
        old = Path(f"{target}.{uuid.uuid4().hex}.replaced")
        if Path(target).exists():
            Path(target).replace(old)
        Path(beside).replace(target)
        if old.exists():
            filesystem.delete_dir(str(old))
        return
    new = [path.removeprefix(f"{beside}/") for path in _files(filesystem, beside)]
    before = [path.removeprefix(f"{target}/") for path in _files(filesystem, target)]
    for name in sorted(new, key=lambda name: name == last):
        filesystem.move(f"{beside}/{name}", f"{target}/{name}")
    for name in set(before) - set(new):
        filesystem.delete_file(f"{target}/{name}")
    filesystem.delete_dir(beside)


def _files(filesystem: fs.FileSystem, folder: str) -> list[str]:
    found = filesystem.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
    return [info.path for info in found if info.type == fs.FileType.File]
