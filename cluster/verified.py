"""Compares files of assets with their manifests before they are read: the size each time, the checksum once."""

from collections.abc import Iterable

from pyarrow import fs

from cluster.files import Part, StorageError, checksums
from cluster.manifest import MARKER, Manifest


class Verified:
    """The files that this process has found to match their manifests."""

    def __init__(self, filesystem: fs.FileSystem) -> None:
        self._filesystem = filesystem
        self._right: set[str] = set()

    def parts(self, asset: str, stored: Iterable[tuple[str, Manifest]], cure: str = "") -> list[Part]:
        """The files and row groups of stored refreshes, each given by its folder and its manifest.

        Args:
            asset: its name.
            stored: the refreshes.
            cure: what to do if a file is damaged; "": make again what it belongs to.

        Raises:
            StorageError: a file is missing or does not match its manifest; the message says what to do.
        """
        parts, sizes, wanted, cures = list[Part](), dict[str, int](), dict[str, str](), dict[str, str]()
        for folder, manifest in stored:
            for path, (name, size) in zip(manifest.paths(folder), manifest.files.items(), strict=True):
                parts.append(Part(path, manifest.groups))
                sizes[path], cures[path] = size, cure or _cure(folder, path, manifest)
                if name in manifest.checksums:
                    wanted[path] = manifest.checksums[name]
        for info in self._filesystem.get_file_info(list(sizes)):
            if info.size != sizes[info.path]:
                raise StorageError(
                    f"{asset}: {info.path} has {info.size} bytes, its manifest says {sizes[info.path]}; "
                    f"{cures[info.path]}"
                )
        new = [path for path in wanted if path not in self._right]
        for path, found in zip(new, checksums(self._filesystem, new, sum(sizes[path] for path in new)), strict=True):
            if found != wanted[path]:
                raise StorageError(
                    f"{asset}: {path} is damaged: its checksum is {found}, its manifest says {wanted[path]}; "
                    f"{cures[path]}"
                )
        self._right |= set(new)
        return parts


def _cure(folder: str, path: str, manifest: Manifest) -> str:
    if manifest.groups is None:
        return f"delete {folder}/{MARKER} and run again"
    record = f"{path.removesuffix('.parquet')}.json"
    return (
        f"restore it from a backup, or delete {record} and make again the refreshes that it names, by --refresh: rows "
        "of source files that are gone are lost then"
    )
