"""Finds the source's files on any file system and cuts them into pieces that independent tasks read."""

import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs

READABLE_SUFFIXES = (".json", ".jsonl", ".parquet")
_SPLITTABLE_SUFFIXES = (".jsonl", ".parquet")
_LISTED_IN_MESSAGE = 5
_OPEN_COST_BYTES = 1 << 20  # opening a file on an object store takes about as long as reading this much


class SourceFile(NamedTuple):
    """One file of the source; `path` opens with `open_filesystem`, `size` in bytes, `mtime_ns` None if unknown."""

    path: str
    size: int
    mtime_ns: int | None


class Piece(NamedTuple):
    """The bytes [start, end) of file number `file`: a record belongs to the piece in which its first byte lies."""

    file: int
    path: str
    start: int
    end: int


def list_source_files(path: str) -> list[SourceFile]:
    """The .json, .jsonl and .parquet files that `path` names, sorted by path.

    Args:
        path: a file, a folder (read recursively), a glob (`*`, `?`, `[...]`, `**`), or a URI of one of these
            (pyarrow's file systems, else fsspec's; in a URI a `?` begins the file system's options).
            Below a folder and in a glob, names that begin with `.` or `_` are skipped, as Spark and Hive do: they
            are files being written.

    Raises:
        ValueError: nothing is there, or no file of these formats; the message says what was found.
    """
    filesystem, base, uri = _resolve(path)
    found = list(_walk(filesystem, base))
    readable = [info for info in found if info.path.lower().endswith(READABLE_SUFFIXES)]
    others = [info.path for info in found if not info.path.lower().endswith(READABLE_SUFFIXES)]
    if not found:
        raise ValueError(
            f"read_instructions: source.path: {shown(path)!r} matches no file; give a file, folder or glob"
        )
    if not readable:
        raise ValueError(
            f"read_instructions: source.path: {shown(path)!r} has no .json, .jsonl or .parquet file; "
            f"found {_some(others)}; convert them to one of these formats"
        )
    if others:
        warnings.warn(f"read_instructions: not read, unknown format: {_some(others)}", stacklevel=2)
    fixed = _fixed_part(base)
    files = [SourceFile(uri.format(info.path[len(fixed) :]), info.size or 0, info.mtime_ns) for info in readable]
    return sorted(files)


def open_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a path or URI, and the path inside it; a relative path is one of this process."""
    if "://" not in path:
        return pafs.LocalFileSystem(), str(Path(path).expanduser().absolute())
    try:
        filesystem, inside = pafs.FileSystem.from_uri(path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # not one of pyarrow's schemes
        import fsspec  # type: ignore[import-untyped]  # ships no type information

        opened, inside = fsspec.core.url_to_fs(path)
        filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(opened))
    return filesystem, inside


def plan_pieces(files: Iterable[str], range_bytes: int) -> list[list[Piece]]:
    """Cut big files into ranges and bundle small ones: each inner list is one task's work of about `range_bytes`.

    The order of pieces is the order of `files`, so a piece's file number and a record's position order all records.
    """
    tasks: list[list[Piece]] = []
    load = 0
    for piece in _cut(list(dict.fromkeys(files)), range_bytes):
        cost = max(piece.end - piece.start, _OPEN_COST_BYTES)
        if not tasks or load + cost > range_bytes:
            tasks.append([])
            load = 0
        tasks[-1].append(piece)
        load += cost
    return tasks


def shown(path: str) -> str:
    """`path` as it may appear in rows and messages: without the credentials and options that a URI can carry."""
    return re.sub(r"://[^/@]*@", "://", path.split("?")[0]) if "://" in path else path


def _cut(files: list[str], range_bytes: int) -> Iterator[Piece]:
    for number, path in enumerate(files):
        filesystem, inside = open_filesystem(path)
        size = filesystem.get_file_info(inside).size or 0
        step = range_bytes if path.lower().split("?")[0].endswith(_SPLITTABLE_SUFFIXES) else max(size, 1)
        for start in range(0, max(size, 1), step):
            yield Piece(number, path, start, min(start + step, size))


def _resolve(path: str) -> tuple[pafs.FileSystem, str, str]:
    """The file system, the path or glob inside it, and a format string that makes a URI of what follows its head."""
    if "://" not in path:
        filesystem, base = open_filesystem(path)
        return filesystem, base, _escaped(_fixed_part(base)) + "{}"
    # A glob is no valid URI, so the file system is made from the part before it.
    head, _, options = path.partition("?")
    fixed = _fixed_part(head).rstrip("/")
    suffix = f"?{options}" if options else ""
    filesystem, base = open_filesystem(fixed + suffix)
    base = base.rstrip("/")
    return filesystem, base + head[len(fixed) :], _escaped(fixed) + "{}" + _escaped(suffix)


def _walk(filesystem: pafs.FileSystem, base: str) -> Iterator[pafs.FileInfo]:
    info = filesystem.get_file_info(base)
    if info.type == pafs.FileType.File:
        yield info
        return
    folder, pattern = base, None
    if info.type != pafs.FileType.Directory:
        if not _is_glob(base):
            return
        folder, pattern = _fixed_part(base), _glob_pattern(base)
    recursive = pattern is None or "**" in base or "/" in base[len(folder) :].lstrip("/")
    selector = pafs.FileSelector(folder, allow_not_found=True, recursive=recursive)
    for entry in filesystem.get_file_info(selector):
        if entry.type != pafs.FileType.File:
            continue
        hidden = any(part.startswith((".", "_")) for part in entry.path[len(folder) :].split("/"))
        if not hidden and (pattern is None or pattern.fullmatch(entry.path)):
            yield entry


def _is_glob(path: str) -> bool:
    return re.search(r"[*?\[]", path) is not None


def _fixed_part(path: str) -> str:
    """The folder before the first wildcard; `path` itself if it has none."""
    match = re.search(r"[*?\[]", path)
    return path if match is None else path[: match.start()].rpartition("/")[0]


def _glob_pattern(glob: str) -> re.Pattern[str]:
    """`**/` is any number of folders, `*` and `?` stay within one name."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", glob)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile(
        "".join(
            meaning.get(part) or (part.replace("[!", "[^", 1) if part.startswith("[") else re.escape(part))
            for part in parts
        )
    )


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _some(paths: list[str]) -> str:
    more = len(paths) - _LISTED_IN_MESSAGE
    return ", ".join(sorted(paths)[:_LISTED_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")
