"""Copies of files between a folder of this machine and a place that may be a bucket, several at a time."""

import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pyarrow import fs

from operators.files.atomic import open_filesystem, write_file

COPIERS = 8
CHUNK_BYTES = 8 << 20


def files_below(place: str) -> dict[str, fs.FileInfo]:
    """Relative name -> file, for all files below a folder or prefix; empty if there is no such place."""
    filesystem, root = open_filesystem(place)
    found = filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    return {info.path.removeprefix(f"{root}/"): info for info in found if info.type == fs.FileType.File}


def pull(place: str, folder: Path, wanted: Callable[[str], bool] = lambda _: True) -> None:
    """Copy the wanted files below a place into a folder of this machine.

    Args:
        place: a path or URI.
        folder: need not exist.
        wanted: called with the name of each file, relative to `place`.
    """
    filesystem, root = open_filesystem(place)

    def copy(name: str) -> None:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with filesystem.open_input_stream(f"{root}/{name}") as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, CHUNK_BYTES)

    _each(copy, [name for name in files_below(place) if wanted(name)])


def push(folder: Path, place: str, names: Iterable[str]) -> None:
    """Copy these files of a folder of this machine to a place; each appears whole or not at all.

    Args:
        folder: holds the files.
        place: a path or URI.
        names: relative to `folder`.
    """
    filesystem, root = open_filesystem(place)

    def copy(name: str) -> None:
        with (folder / name).open("rb") as source:
            write_file(filesystem, f"{root}/{name}", lambda sink: shutil.copyfileobj(source, sink, CHUNK_BYTES))

    _each(copy, names)


def delete(place: str) -> None:
    """Delete a file, or a folder with all that is in it; no error if there is none."""
    filesystem, root = open_filesystem(place)
    match filesystem.get_file_info(root).type:
        case fs.FileType.Directory:
            filesystem.delete_dir(root)
        case fs.FileType.File:
            filesystem.delete_file(root)


def exists(place: str) -> bool:
    """Whether there is a file or folder."""
    filesystem, root = open_filesystem(place)
    return bool(filesystem.get_file_info(root).type != fs.FileType.NotFound)


def read_text(place: str) -> str | None:
    """The text of a file; None if there is no such file."""
    filesystem, root = open_filesystem(place)
    if filesystem.get_file_info(root).type != fs.FileType.File:
        return None
    with filesystem.open_input_stream(root) as stream:
        return bytes(stream.read()).decode()


def _each(copy: Callable[[str], None], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(COPIERS) as threads:
        list(threads.map(copy, names))
