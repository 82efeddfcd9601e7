"""Files and folders that appear complete or not at all, on any file system of pyarrow or fsspec."""

import ctypes
import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

UNFINISHED = ".unfinished"
REPLACED = ".replaced"  # ends the name of a folder that another one replaces
_REPLACED = re.compile(rf"\.[0-9a-f]{{32}}{re.escape(REPLACED)}")  # after the folder's own name; others are not ours
OBJECT_STORES = ("s3", "gcs", "abfs")  # an object appears only when it is complete; a rename is a copy


def open_filesystem(path: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI, and the path inside it; a relative path is relative to this process's folder.

    Raises:
        ValueError: the scheme of the URI is unknown, or a package for it is missing.
    """
    if "://" not in path:
        return fs.LocalFileSystem(), str(Path(path).expanduser().absolute())
    try:
        filesystem, inside = fs.FileSystem.from_uri(path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # not one of pyarrow's schemes
        import fsspec  # type: ignore[import-untyped]  # ships no type information

        try:
            opened, inside = fsspec.core.url_to_fs(path)
        except ImportError as error:
            raise ValueError(f"{path.partition('://')[0]}://: {error}") from None
        filesystem = fs.PyFileSystem(fs.FSSpecHandler(opened))
    return filesystem, inside


def put_file(path: str, content: str | bytes | Callable[[Any], None]) -> None:
    """Write a whole file at a path or URI, as `write_file` does; its folder need not exist."""
    filesystem, target = open_filesystem(path)
    write_file(filesystem, target, content)


def write_file(filesystem: fs.FileSystem, target: str, content: str | bytes | Callable[[Any], None]) -> None:
    """Write a whole file: readers see the old file or all of `content`, also after a power failure.

    A local file is written under a hidden name in the same folder, flushed to disk and renamed. On an object store a
    PUT is atomic; but if `content` is a function that fails, there is no file afterwards, even if there was one before,
    because closing its stream stores what it had written. For the same reason another thread writes there: Ctrl-C
    would cut off the main thread, and the object would be an empty one.

    Args:
        filesystem: of the file.
        target: its path there; its folder need not exist.
        content: text is written as UTF-8; a function is handed an open pyarrow stream to write to.
    """
    if filesystem.type_name in OBJECT_STORES:
        with ThreadPoolExecutor(1) as writer:
            writer.submit(_write_object, filesystem, target, content).result()
        return
    folder, _, name = target.rpartition("/")
    filesystem.create_dir(folder)
    beside = f"{folder}/.{name}.{uuid.uuid4().hex}{UNFINISHED}"
    try:
        _write(filesystem, beside, content)
        filesystem.move(beside, target)
    except BaseException:
        if filesystem.get_file_info(beside).type == fs.FileType.File:
            filesystem.delete_file(beside)
        raise


def _write_object(filesystem: fs.FileSystem, target: str, content: str | bytes | Callable[[Any], None]) -> None:
    try:
        _write(filesystem, target, content)
    except BaseException:
        if callable(content):
            with suppress(OSError):
                filesystem.delete_file(target)
        raise


def _write(filesystem: fs.FileSystem, path: str, content: str | bytes | Callable[[Any], None]) -> None:
    with filesystem.open_output_stream(path) as stream:
        if callable(content):
            content(stream)
        else:
            stream.write(content.encode() if isinstance(content, str) else content)
    if isinstance(filesystem, fs.LocalFileSystem):  # after a power failure, the name must not exist without the content
        with Path(path).open("rb") as written:
            os.fsync(written.fileno())


def swap_folder(beside: str, target: str) -> None:
    """Replace the local folder `target` by the finished folder `beside`; the old contents are deleted.

    The two names are exchanged in one step, so that a reader finds the old or the new folder, even if this process is
    killed. A file system that cannot do this (NFS) needs two renames; if this process is killed in between, the next
    call restores the old folder.

    Args:
        beside: a finished folder next to `target`.
        target: the folder to replace; need not exist.
    """
    _swap_local(Path(beside), Path(target))
    for left in _replaced(Path(target)):
        shutil.rmtree(left)


def _replaced(target: Path) -> list[Path]:
    """The folders that calls which were killed have moved out of the way."""
    found = target.parent.glob(f"{target.name}.*{REPLACED}")
    return [path for path in found if _REPLACED.fullmatch(path.name.removeprefix(target.name))]


def _swap_local(beside: Path, target: Path) -> None:
    cut_off = sorted(_replaced(target), key=lambda path: path.stat().st_mtime)
    if not target.exists() and cut_off:
        cut_off[-1].replace(target)
    old = target.with_name(f"{target.name}.{uuid.uuid4().hex}{REPLACED}")
    if not target.exists():
        beside.replace(target)
    elif _exchange(beside, target):
        beside.replace(old)
    else:
        target.replace(old)
        beside.replace(target)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False if the kernel or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename is None:
        return False
    if rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))
