"""The record of a finished asset, what it was made from and what it holds: `manifest.json` next to its files."""

import hashlib
import json
import posixpath
from typing import Any

from pyarrow import fs
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from cluster.files import StorageError
from operators.files.seals import unsealed

MARKER, MANIFEST = "_SUCCESS", "manifest.json"
MOST_READ = 50_000
Description = dict[str, Any]  # what an asset is made from, as plain JSON


class Manifest(BaseModel):
    """The record of one finished asset, of one refresh if it has refreshes.

    Attributes:
        asset: its name.
        refresh: its key; None if the asset is made over all refreshes.
        order: the number of the refresh among all, from 1; it stays when the refresh is made again; 0 if unknown.
        fingerprint: a hash of `made_from`.
        made_from: code version, configuration and inputs.
        seconds: time to make it.
        peak_memory_mib: what the run's processes held at the peak, see `cluster.memory`.
        files: name -> size in bytes, of an asset that holds rows.
        checksums: name -> CRC-32 of these files, hexadecimal.
        rows: how many rows the files hold; None if the asset holds a value.
        outcomes: rows by outcome.
        ids: a sum over all row ids, hexadecimal; "" if rows have no id.
        value: the value of an asset without rows, as plain JSON.
        metrics: numbers, and counts by name, that the stage reports about its work.
    """

    model_config = ConfigDict(frozen=True)

    asset: str = ""
    refresh: str | None = None
    order: int = 0
    fingerprint: str
    made_from: Description = {}
    seconds: float = 0.0
    peak_memory_mib: int = 0
    files: dict[str, int] = {}
    groups: tuple[int, int] | None = None
    checksums: dict[str, str] = {}
    rows: int | None = None
    outcomes: dict[str, int] = {}
    ids: str = ""
    value: dict[str, Any] | None = None
    # Storages written before 2026-11-26 call this "figures".
    metrics: dict[str, int | float | dict[str, int]] = Field(
        default={}, validation_alias=AliasChoices("metrics", "figures")
    )

    def paths(self, folder: str) -> list[str]:
        """Paths of its files, whose names are relative to its folder. In a bundle, the folder need not exist."""
        return [posixpath.normpath(f"{folder}/{name}") for name in self.files]


def fingerprint_of(description: Description) -> str:
    """A short hash of everything that an asset was made from."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


# Manifests that this process has read: path -> ((time of writing, size), content). A daemon opens the store again at
# every look, and so reads only manifests that have changed.
_READ: dict[str, tuple[tuple[int, int], Manifest]] = {}


def current_manifest(filesystem: fs.FileSystem, asset: str, folder: str) -> Manifest | None:
    """The record of the finished asset in a folder; None if it was never finished.

    Raises:
        StorageError: the record is there but cannot be read.
    """
    marker, file = filesystem.get_file_info([f"{folder}/{MARKER}", f"{folder}/{MANIFEST}"])
    if marker.type == fs.FileType.NotFound:
        return None
    place = f"{filesystem.type_name}:{folder}"
    known = _READ.get(place)
    written = file.mtime_ns, file.size
    if known is None or known[0] != written:
        known = written, read_manifest(filesystem, asset, folder)
        if len(_READ) >= MOST_READ:
            _READ.clear()
        _READ[place] = known
    return known[1]


def forget_manifest(filesystem: fs.FileSystem, folder: str) -> None:
    """Forget the record in a folder, so that it is read again.

    Time and size may not tell two records apart, because a bucket's times are whole seconds.
    """
    _READ.pop(f"{filesystem.type_name}:{folder}", None)


def read_manifest(filesystem: fs.FileSystem, asset: str, folder: str) -> Manifest:
    """The record in a folder, whether the asset is finished or not.

    Raises:
        StorageError: it cannot be read; the message says what to do.
    """
    try:
        with filesystem.open_input_stream(f"{folder}/{MANIFEST}") as stream:
            return Manifest.model_validate(unsealed(stream.read()))
    except (OSError, ValueError):  # ValidationError is a ValueError
        raise StorageError(
            f"{asset}: {folder}/{MANIFEST} cannot be read; delete {folder}/{MARKER} and run again"
        ) from None
