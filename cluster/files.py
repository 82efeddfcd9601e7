"""Reads the storage's Parquet files as rows, computes their checksums, and explains its errors in one line."""

import errno
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pyarrow import fs
from ray.data import Dataset

from operators.files.places import in_bucket

READERS = 8  # threads of the driver
MOST_ON_DRIVER = 1 << 30  # bytes; more are read by tasks on the whole cluster
CHUNK_BYTES = 8 << 20
MANY, SMALL_BYTES = 32, 1 << 20  # at least this many files, of at most this mean size, are read in groups
GROUP_BYTES = 64 << 20  # of a group, which one task reads
S3_ERROR = "AWS Error "  # comes before the code in pyarrow's messages


class StorageError(RuntimeError):
    """The storage cannot be read or written; the message, of one line, says what, why and the cure."""


def open_rows(filesystem: fs.FileSystem, files: Sequence[str]) -> Dataset:
    """The rows of Parquet files of one schema, lazily.

    A year of refreshes leaves hundreds of small files per asset. For 365 files of 8 rows, `ray.data.read_parquet` took
    6.4 s, tasks that read one file after the other took 0.4 s (two CPUs). For larger files `ray.data.read_parquet` is
    used, because it skips columns.
    """
    if len(files) <= MANY:
        return ray.data.read_parquet(list(files), filesystem=filesystem, partitioning=None)
    size = sum(info.size or 0 for info in filesystem.get_file_info(list(files)))
    if size > len(files) * SMALL_BYTES:
        return ray.data.read_parquet(list(files), filesystem=filesystem, partitioning=None)
    each = -(-len(files) // (1 + size // GROUP_BYTES))
    groups = [pa.table({"file": files[start : start + each]}) for start in range(0, len(files), each)]
    read = partial(_read_group, filesystem=filesystem)
    return ray.data.from_arrow(groups).map_batches(read, batch_size=None, batch_format="pyarrow", num_cpus=0.25)


def _read_group(group: pa.Table, filesystem: fs.FileSystem) -> Iterator[pa.Table]:
    for path in group["file"].to_pylist():
        yield pq.read_table(path, filesystem=filesystem, partitioning=None)


def checksums(filesystem: fs.FileSystem, paths: Sequence[str], total_bytes: int) -> list[str]:
    """The CRC-32 of each file's content, hexadecimal: a flipped bit changes it."""
    if total_bytes <= MOST_ON_DRIVER:
        with ThreadPoolExecutor(READERS) as threads:
            return list(threads.map(lambda path: _checksum(filesystem, path), paths))
    read = ray.remote(num_cpus=0.25)(_checksum)
    found: list[str] = ray.get([read.remote(filesystem, path) for path in paths])
    return found


def _checksum(filesystem: fs.FileSystem, path: str) -> str:
    value = 0
    with filesystem.open_input_stream(path) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def explained(error: OSError, storage: str) -> str | None:
    """One line for an error of the operating system or the object store about the storage; None for other errors."""
    text = str(error)
    if in_bucket(storage) and (S3_ERROR in text or "Bucket '" in text):
        said = text.partition(S3_ERROR)[2] or text
        return f"storage: {storage}: {' '.join(said.split())}; check it, then run the same command again"
    place = error.filename or storage
    cures = {
        errno.ENOSPC: f"storage: the disk of {place} is full; free space, then run the same command again",
        errno.EDQUOT: f"storage: the quota of {place} is used up; free space, then run the same command again",
        errno.EROFS: f"storage: {place} is read-only; give another by storage=<folder>",
        errno.EACCES: f"storage: no permission to write {place}; change its owner or give another by storage=<folder>",
        errno.EPERM: f"storage: no permission to write {place}; change its owner or give another by storage=<folder>",
        errno.EIO: f"storage: the disk of {place} fails (input/output error); look at the system's log",
    }
    return cures.get(error.errno or 0)
