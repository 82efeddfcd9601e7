"""Reads the storage's Parquet files as rows, computes their checksums, and explains its errors in one line."""

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pyarrow import fs
from ray.data import Dataset

from operators.files.checksums import checksum
from operators.files.places import in_bucket

READERS = 8  # threads of the driver
MOST_ON_DRIVER = 1 << 30  # bytes; more are read by tasks on the whole cluster
MANY, SMALL_BYTES = 32, 1 << 20  # at least this many files, of at most this mean size, are read in groups
GROUP_BYTES = 64 << 20  # of a group, which one task reads
_AGAIN = "then run the same command again"
_DENIED = "no permission to write {place}; change its owner or give another by storage=<folder>"
_AWAY = "the file server of {place} does not answer as it should; mount it again, " + _AGAIN
_MANY = "too many files are open, the last one was {place}; raise `ulimit -n`, " + _AGAIN
CURES = {
    errno.ENOSPC: "the disk of {place} is full; free space, " + _AGAIN,
    errno.EDQUOT: "the quota of {place} is used up; free space, " + _AGAIN,
    errno.EROFS: "{place} is read-only; give another by storage=<folder>",
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EIO: "the disk of {place} fails (input/output error); look at the system's log",
    errno.ENOENT: "{place} is not there, or not any more; look whether its disk is mounted, " + _AGAIN,
    errno.ENOTDIR: "a part of the path {place} is a file, not a folder; give another by storage=<folder>",
    errno.EEXIST: "{place} is a file, not a folder; give another by storage=<folder>",
    errno.ENAMETOOLONG: "{place} is too long for a name; give a shorter storage or key",
    errno.ESTALE: _AWAY,
    errno.ENOTCONN: _AWAY,
    errno.ETIMEDOUT: _AWAY,
    errno.EMFILE: _MANY,
    errno.ENFILE: _MANY,
}
S3_ERROR = "AWS Error "  # comes before the code in pyarrow's messages


class StorageError(RuntimeError):
    """The storage cannot be read or written; the message, of one line, says what, why and the cure."""


class Part(NamedTuple):
    """A Parquet file, or a range of its row groups: the first, and the one after the last."""

    path: str
    groups: tuple[int, int] | None = None


def open_rows(filesystem: fs.FileSystem, parts: Sequence[Part]) -> Dataset:
    """The rows of Parquet files of one schema, lazily.

    A year of refreshes leaves hundreds of small files per asset. For 365 files of 8 rows, `ray.data.read_parquet` took
    6.4 s, tasks that read one file after the other took 0.4 s (two CPUs). For larger files `ray.data.read_parquet` is
    used, because it skips columns.
    """
    files = list(dict.fromkeys(part.path for part in parts))
    whole = all(part.groups is None for part in parts)
    if whole and len(files) <= MANY:
        return ray.data.read_parquet(files, filesystem=filesystem, partitioning=None)
    sizes = {info.path: info.size or 0 for info in filesystem.get_file_info(files)}
    large = {path for path in files if sizes[path] > GROUP_BYTES}
    if whole and (large or sum(sizes.values()) > len(files) * SMALL_BYTES):
        return ray.data.read_parquet(files, filesystem=filesystem, partitioning=None)
    tasks = _tasks([part for part in parts if part.path not in large], sizes)
    read = partial(_read_group, filesystem=filesystem)
    rows = ray.data.from_arrow(tasks).map_batches(read, batch_size=None, batch_format="pyarrow", num_cpus=0.25)
    if not large:
        return rows
    return rows.union(ray.data.read_parquet(sorted(large), filesystem=filesystem, partitioning=None))


def _tasks(parts: Sequence[Part], sizes: Mapping[str, int]) -> list[pa.Table]:
    """Divide parts among tasks of about GROUP_BYTES; all wanted row groups of a file go to one task."""
    wanted: dict[str, list[int] | None] = {}
    for part in parts:
        of_file = wanted.setdefault(part.path, None if part.groups is None else [])
        if of_file is not None and part.groups is not None:
            of_file += range(*part.groups)
    tasks: list[list[dict[str, Any]]] = [[]]
    held = 0
    for path, groups in wanted.items():
        if tasks[-1] and held + sizes[path] > GROUP_BYTES:
            tasks.append([])
            held = 0
        held += sizes[path]
        tasks[-1].append({"file": path, "groups": groups})
    schema = pa.schema([("file", pa.string()), ("groups", pa.list_(pa.int32()))])
    return [pa.Table.from_pylist(task, schema=schema) for task in tasks]


def _read_group(group: pa.Table, filesystem: fs.FileSystem) -> Iterator[pa.Table]:
    for part in group.to_pylist():
        with filesystem.open_input_file(part["file"]) as stream:
            file = pq.ParquetFile(stream)
            yield file.read() if part["groups"] is None else file.read_row_groups(part["groups"])


def checksums(filesystem: fs.FileSystem, paths: Sequence[str], total_bytes: int) -> list[str]:
    """The CRC-32 of each file's content, hexadecimal: a flipped bit changes it."""
    if total_bytes <= MOST_ON_DRIVER:
        with ThreadPoolExecutor(READERS) as threads:
            return list(threads.map(lambda path: checksum(filesystem, path), paths))
    read = ray.remote(num_cpus=0.25)(checksum)
    found: list[str] = ray.get([read.remote(filesystem, path) for path in paths])
    return found


def explained(error: OSError, storage: str) -> str | None:
    """One line for an error of the operating system or the object store about the storage; None for other errors.

    An error that has no cure of its own is named with its place.
    """
    text = str(error)
    if in_bucket(storage) and (S3_ERROR in text or "Bucket '" in text):
        said = text.partition(S3_ERROR)[2] or text
        return f"storage: {storage}: {' '.join(said.split())}; check it, then run the same command again"
    if not error.errno:
        return None
    place = error.filename or storage
    if error.errno in CURES:
        return f"storage: {CURES[error.errno].format(place=place)}"
    words = os.strerror(error.errno).lower()
    return (
        f"{place}: {words} ({errno.errorcode.get(error.errno, error.errno)}); check it, then run the same command again"
    )
