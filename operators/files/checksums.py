"""CRC-32 of files, so that a flipped bit in them is found; as hexadecimal text."""

import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from pyarrow import fs

from operators.files.atomic import open_filesystem

READERS = 8
CHUNK_BYTES = 8 << 20


def checksum(filesystem: fs.FileSystem, path: str) -> str:
    """The CRC-32 of a file's content."""
    value = 0
    with filesystem.open_input_stream(path) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def checksums_of(place: str, names: Iterable[str]) -> dict[str, str]:
    """Name -> CRC-32 of files below a place, read by several threads of this process.

    Args:
        place: a path or URI.
        names: of files, relative to the place.

    Raises:
        OSError: a file cannot be read.
    """
    filesystem, root = open_filesystem(place)
    wanted = sorted(names)
    with ThreadPoolExecutor(READERS) as threads:
        found = threads.map(lambda name: checksum(filesystem, f"{root}/{name}"), wanted)
        return dict(zip(wanted, found, strict=True))


def damaged_files(place: str, noted: Mapping[str, str]) -> list[str]:
    """Names of the files below a place that are gone, or whose CRC-32 is not the noted one, sorted.

    Raises:
        OSError: a file that is there cannot be read.
    """
    filesystem, root = open_filesystem(place)
    infos = filesystem.get_file_info([f"{root}/{name}" for name in noted])
    there = [name for name, info in zip(noted, infos, strict=True) if info.type == fs.FileType.File]
    found = checksums_of(place, there)
    return sorted(name for name, wanted in noted.items() if found.get(name) != wanted)
