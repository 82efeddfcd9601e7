"""Finds the source's files on any file system and cuts them into pieces that independent tasks read."""

import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from operators.files.atomic import open_filesystem
from operators.read.globs import fixed_part, glob_pattern, is_glob
from operators.read.message_tables import is_message_table
from operators.read.record import READ_BYTES
from operators.read.text_streams import BOM, LINES, format_of, holds_lines

READABLE = ("csv", "json", "jsonl", "ndjson", "parquet", "tsv", "arrow")
ALL_SPLITS = "all"
SPLITS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|testing|eval|evaluation",
}  # words in names of files and folders that mean a split, as in the `datasets` library
# Files that describe a data set which Hugging Face's libraries wrote.
METADATA = frozenset(("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"))

_LISTED_IN_MESSAGE = 5
_OPEN_COST_BYTES = 1 << 20  # opening a file on an object store takes about as long as reading this much


class SourceFile(NamedTuple):
    """One file of the source.

    Attributes:
        path: path or URI that `operators.files.atomic.open_filesystem` opens.
        name: path relative to the folder that the source names, so that it does not depend on the other files.
        size: bytes.
        mtime_ns: when it was written, in ns since 1970; None if unknown.
    """

    path: str
    name: str
    size: int
    mtime_ns: int | None


class Piece(NamedTuple):
    """The bytes [start, end) of file number `file`; a record belongs to the piece that holds its first byte."""

    file: int
    path: str
    start: int
    end: int


def list_source_files(path: str, split: str = ALL_SPLITS) -> list[SourceFile]:
    """The files that `path` names and that can be read, sorted by path.

    Args:
        path: a file, a folder (read recursively), a glob (`*`, `?`, `[...]`, `**`), or a URI of one of these, such as
            `hf://datasets/<owner>/<name>` (pyarrow's file systems, else fsspec's; in a URI a `?` begins the file
            system's options). Below a folder and in a glob, names that begin with `.` or `_` are skipped, as in Spark
            and Hive, because these are files that are still being written.
        split: see `of_split`.

    Raises:
        ValueError: there is no file, none of a known format, or none of this split; the message says what was found.
    """
    filesystem, base, uri = _resolve(path)
    found = list(_walk(filesystem, base))
    if not found:
        raise ValueError(
            f"read_instructions: source.path: {shown(path)!r} matches no file; give a file, folder or glob"
        )
    readable = [info for info in found if _is_readable(info.base_name)]
    others = _unknown(found)
    if not readable:
        raise ValueError(
            f"read_instructions: source.path: {shown(path)!r} has no file that ends in .{', .'.join(READABLE)}, or in "
            f"one of these and .gz, .zst or .bz2; found {_some(others)}; convert them"
        )
    if others:
        warnings.warn(f"read_instructions: not read, unknown format: {_some(others)}", stacklevel=2)
    fixed = fixed_part(base)
    files = [
        SourceFile(uri.format(info.path[len(fixed) :]), _name(info.path, base), info.size or 0, info.mtime_ns)
        for info in readable
    ]
    return of_split(sorted(files), split)


def would_read(path: str, place: str, names: Iterable[str]) -> bool:
    """Whether `list_source_files(path)` would find one of these files below a place, if they existed.

    Args:
        path: as for `list_source_files`.
        place: a folder or URI.
        names: of files, relative to the place. A source inside the topmost folder of one of them counts too.

    Raises:
        ValueError: the scheme of a URI is unknown.
    """
    filesystem, base, _ = _resolve(path)
    other, root = open_filesystem(place)
    if filesystem.type_name != other.type_name:
        return False
    fixed = fixed_part(base)
    if isinstance(filesystem, pafs.LocalFileSystem):  # links
        base, root = os.path.realpath(fixed) + base[len(fixed) :], os.path.realpath(root)
    tops = {f"{root}/{name.partition('/')[0]}/" for name in names}
    if any(f"{base}/".startswith(top) for top in tops):
        return True
    folder, pattern = (fixed_part(base), glob_pattern(base)) if is_glob(base) else (base, None)
    return any(_is_wanted(f"{root}/{name}", folder, pattern) for name in names)


def unknown_files(path: str) -> str:
    """Names of the first few files of the source whose format cannot be read, joined; "" if there are none."""
    filesystem, base, _ = _resolve(path)
    others = _unknown(_walk(filesystem, base))
    return _some(others) if others else ""


def files_of_other_splits(path: str, split: str) -> dict[str, list[str]]:
    """Names of the source's files that `split` leaves out, by the split that their names show."""
    files = list_source_files(path)
    read = {file.path for file in of_split(files, split)}
    found: dict[str, list[str]] = {}
    for file in files:
        if file.path not in read:
            found.setdefault(_split_of(file.name), []).append(file.name)
    return found


def _unknown(found: Iterable[pafs.FileInfo]) -> list[str]:
    return [info.path for info in found if not _is_readable(info.base_name) and info.base_name not in METADATA]


def of_split(files: list[SourceFile], split: str) -> list[SourceFile]:
    """The files of one split, by the names of files and folders: `data/train-00000-of-00002.parquet`.

    Args:
        files: of the source.
        split: train, validation or test; `all` reads everything. Files whose name has no split are always read. If the
            source has other splits but no train split, `train`, the default, reads everything.

    Raises:
        ValueError: there is no such split.
    """
    of_file = {file.path: _split_of(file.name) for file in files}
    found = {name for name in of_file.values() if name}
    if split not in SPLITS or (split == "train" and split not in found):
        return files
    if split not in found:
        raise ValueError(
            f"read_instructions: source.split: no file name of the source has the split {split!r}; the splits are "
            f"{', '.join(sorted(found)) or 'none'}; give one of these, or all"
        )
    return [file for file in files if of_file[file.path] in (split, "")]


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
    """`path` for rows and messages: without the credentials and options that a URI can have."""
    return re.sub(r"://[^/@]*@", "://", path.split("?")[0]) if "://" in path else path


def _cut(files: list[str], range_bytes: int) -> Iterator[Piece]:
    for number, path in enumerate(files):
        filesystem, inside = open_filesystem(path)
        size = filesystem.get_file_info(inside).size or 0
        step = range_bytes if size > range_bytes and _can_be_cut(filesystem, inside) else max(size, 1)
        for start in range(0, max(size, 1), step):
            yield Piece(number, path, start, min(start + step, size))


def _can_be_cut(filesystem: pafs.FileSystem, path: str) -> bool:
    kind, compression = format_of(path)
    if compression is not None or kind not in (*LINES, "parquet"):
        return False
    if kind == "parquet":
        return not is_message_table(_columns_of(filesystem, path))
    with filesystem.open_input_stream(path) as stream:
        head = stream.read(READ_BYTES)
    return holds_lines(head, kind) and not is_message_table(_keys_of_first_line(head))


def _columns_of(filesystem: pafs.FileSystem, path: str) -> list[str]:
    try:
        names: list[str] = pq.read_schema(path, filesystem=filesystem).names
    except (pa.ArrowException, OSError):  # whoever reads the file reports that it is damaged
        return []
    return names


def _keys_of_first_line(head: bytes) -> list[str]:
    try:
        value = json.loads(head.lstrip().partition(b"\n")[0].removeprefix(BOM))
    except (ValueError, RecursionError):
        return []
    return list(value) if isinstance(value, dict) else []


def _is_readable(name: str) -> bool:
    return format_of(name)[0] in READABLE and name not in METADATA


def _split_of(name: str) -> str:
    """The split in a path, from the innermost part that names one; "" if none does."""
    for part in reversed(name.lower().split("/")):
        for split, words in SPLITS.items():
            if re.search(rf"(?:^|[-._ 0-9])(?:{words})(?:$|[-._ 0-9])", part):
                return split
    return ""


def _name(path: str, base: str) -> str:
    """The path relative to the folder that the source names; for a single file its name."""
    folder = base if path != base else base.rpartition("/")[0]
    return path.removeprefix(fixed_part(folder)).lstrip("/")


def _resolve(path: str) -> tuple[pafs.FileSystem, str, str]:
    """The file system, the path or glob inside it, and a format string that makes a URI of a path inside it."""
    if "://" not in path:
        filesystem, base = open_filesystem(path)
        return filesystem, base, _escaped(fixed_part(base)) + "{}"
    # A glob is not a valid URI, so the file system is made from the part before it.
    head, _, options = path.partition("?")
    fixed = fixed_part(head).rstrip("/")
    suffix = f"?{options}" if options else ""
    filesystem, base = open_filesystem(fixed + suffix)
    if isinstance(filesystem, pafs.PyFileSystem):
        filesystem.handler.fs.invalidate_cache()  # fsspec keeps listings, in which a daemon would see no new file
    base = base.rstrip("/")
    return filesystem, base + head[len(fixed) :], _escaped(fixed) + "{}" + _escaped(suffix)


def _walk(filesystem: pafs.FileSystem, base: str) -> Iterator[pafs.FileInfo]:
    info = filesystem.get_file_info(base)
    if info.type == pafs.FileType.File:
        yield info
        return
    folder, pattern = base, None
    if info.type != pafs.FileType.Directory:
        if not is_glob(base):
            return
        folder, pattern = fixed_part(base), glob_pattern(base)
    recursive = pattern is None or "**" in base or "/" in base[len(folder) :].lstrip("/")
    selector = pafs.FileSelector(folder, allow_not_found=True, recursive=recursive)
    for entry in filesystem.get_file_info(selector):
        if entry.type != pafs.FileType.File:
            continue
        if _is_wanted(entry.path, folder, pattern):
            yield entry


def _is_wanted(file: str, folder: str, pattern: re.Pattern[str] | None) -> bool:
    """Whether a file is below a folder, not hidden there, and matches the glob, if there is one."""
    if not file.startswith(f"{folder.rstrip('/')}/"):
        return False
    hidden = any(part.startswith((".", "_")) for part in file[len(folder) :].split("/"))
    return not hidden and (pattern is None or pattern.fullmatch(file) is not None)


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _some(paths: list[str]) -> str:
    more = len(paths) - _LISTED_IN_MESSAGE
    return ", ".join(sorted(paths)[:_LISTED_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")
