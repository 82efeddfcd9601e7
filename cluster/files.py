"""Checksums of the storage's files, and in one line what the storage refuses."""

import errno
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import ray
from pyarrow import fs

from operators.files.places import in_bucket

READERS = 8  # threads of the driver
MOST_ON_DRIVER = 1 << 30  # bytes; more are read by tasks on the whole cluster
CHUNK_BYTES = 8 << 20
S3_ERROR = "AWS Error "  # comes before the code in pyarrow's messages


class StorageError(RuntimeError):
    """The storage cannot be read or written; the message names what, why and the cure, and is shown as one line."""


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
    """One line for what an operating system or an object store says of the storage; None for any other error."""
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
