"""Bundles: many small refreshes of an asset share a file of rows and a file of manifests, so that there are few files.

A new refresh has its own folder, `refresh=<key>/`. If an asset has more than MOST_LOOSE small ones, they are moved to
`bundles/<name>.parquet`, with one row group per refresh, and `bundles/<name>.json`, with their manifests. A finished
folder has priority over the record in a bundle, so a refresh can be made again at any time; its old rows are removed
when the bundle is next written.

Only the holder of the storage's lease writes bundles, and only while nothing in its process reads rows lazily.
"""

import uuid
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from pydantic import BaseModel, ConfigDict

from cluster.files import StorageError, checksums
from cluster.manifest import MANIFEST, MARKER, Manifest, current_manifest
from operators.files.atomic import write_file
from operators.files.seals import sealed, unsealed

FOLDER, REFRESH = "bundles", "refresh="
MOST_LOOSE = 32  # refreshes of an asset with their own folders
SMALL_BYTES, BUNDLE_BYTES = 1 << 20, 64 << 20  # largest sizes of a bundled refresh and of a bundle


class Bundle(BaseModel):
    """The manifests of the refreshes of one bundle; each names the file of rows and its row groups in it."""

    model_config = ConfigDict(frozen=True)

    members: tuple[Manifest, ...]


# Bundles that this process has read: path -> ((time of writing, size), content).
_READ: dict[str, tuple[tuple[int, int], Bundle]] = {}


def bundled(filesystem: fs.FileSystem, asset: str, folder: str) -> dict[str, Manifest]:
    """The manifests of all bundled refreshes of the asset in `folder`, by key.

    Raises:
        StorageError: a bundle cannot be read.
    """
    members = [one for path in _listed(filesystem, folder, ".json") for one in _read(filesystem, asset, path).members]
    return {str(member.refresh): member for member in members}


def leave_bundle(filesystem: fs.FileSystem, asset: str, folder: str, refresh: str) -> None:
    """Remove the record of a refresh from its bundle."""
    for path in _listed(filesystem, folder, ".json"):
        members = _read(filesystem, asset, path).members
        if any(member.refresh == refresh for member in members):
            kept = tuple(member for member in members if member.refresh != refresh)
            write_file(filesystem, path, sealed(Bundle(members=kept)))
            _READ.pop(path, None)


def leave_with_rows(filesystem: fs.FileSystem, folder: str, manifest: Manifest) -> None:
    """Move a bundled refresh, its rows too, into a folder of its own, without the marker of a finished one.

    Damaged rows cannot be moved: the record alone gets its own folder, and still names the bundle's file.
    """
    own, table = f"{folder}/{REFRESH}{manifest.refresh}", table_of(filesystem, folder, manifest)
    if table is not None:
        name = f"{uuid.uuid4().hex}.parquet"
        write_file(filesystem, f"{own}/{name}", lambda stream: pq.write_table(table, stream, write_page_checksum=True))
        path, size = f"{own}/{name}", filesystem.get_file_info(f"{own}/{name}").size
        [found] = checksums(filesystem, [path], size)
        manifest = manifest.model_copy(update={"files": {name: size}, "checksums": {name: found}, "groups": None})
    write_file(filesystem, f"{own}/{MANIFEST}", sealed(manifest))
    leave_bundle(filesystem, manifest.asset, folder, str(manifest.refresh))


def tidy(filesystem: fs.FileSystem, asset: str, folder: str, most_loose: int) -> int:
    """Bundle the small refreshes if there are many, and rewrite bundles with rows that belong to no refresh.

    A file that does not match its manifest is not moved; an error is raised when it is read. If the process is killed
    at any point, each refresh still has its rows, and the next call continues.

    Returns:
        The number of refreshes that were moved.
    """
    loose = _loose(filesystem, asset, folder)
    _forget_doubles(filesystem, asset, folder, set(loose))
    held = {path: _read(filesystem, asset, path).members for path in _listed(filesystem, folder, ".json")}
    _delete_orphans(filesystem, folder, held)
    dead = {path: members for path, members in held.items() if _has_dead_rows(filesystem, path, members)}
    small = [one for one in loose.values() if sum(one.files.values()) <= SMALL_BYTES]
    moved = small if len(small) > most_loose else []
    again = [member for members in dead.values() for member in members]
    written = set()
    for group in _groups(filesystem, folder, sorted([*moved, *again], key=lambda one: (one.order, str(one.refresh)))):
        written |= _write(filesystem, folder, group)
    for one in moved:
        if one.refresh in written:
            _delete_folder(filesystem, f"{folder}/{REFRESH}{one.refresh}")
    for path, members in dead.items():
        if {one.refresh for one in members} <= written:
            filesystem.delete_file(path)
            filesystem.delete_file(_rows_of(path))
    return len([one for one in moved if one.refresh in written])


def table_of(filesystem: fs.FileSystem, folder: str, manifest: Manifest) -> pa.Table | None:
    """The rows of a refresh, read by this process; None if a file does not match the manifest."""
    tables = []
    for name, path in zip(manifest.files, manifest.paths(f"{folder}/{REFRESH}{manifest.refresh}"), strict=True):
        try:
            with filesystem.open_input_stream(path) as stream:
                content = stream.read()
        except OSError:
            return None
        if f"{zlib.crc32(content):08x}" != manifest.checksums.get(name):
            return None
        file = pq.ParquetFile(pa.BufferReader(content))
        groups = range(file.num_row_groups) if manifest.groups is None else range(*manifest.groups)
        tables.append(file.read_row_groups(list(groups)))
    table = pa.concat_tables(tables) if tables else None
    return table if table is not None and table.num_rows == manifest.rows else None


def _loose(filesystem: fs.FileSystem, asset: str, folder: str) -> dict[str, Manifest]:
    """The finished refreshes with their own folders."""
    found = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    manifests = [current_manifest(filesystem, asset, one.path) for one in found if one.base_name.startswith(REFRESH)]
    return {str(one.refresh): one for one in manifests if one is not None and one.files}


def _groups(
    filesystem: fs.FileSystem, folder: str, manifests: Sequence[Manifest]
) -> Iterator[list[tuple[Manifest, pa.Table]]]:
    """Group refreshes by schema, with at most BUNDLE_BYTES in memory per group."""
    open_groups: dict[str, list[tuple[Manifest, pa.Table]]] = {}
    for manifest in manifests:
        table = table_of(filesystem, folder, manifest)
        if table is None:
            continue
        schema = table.schema.to_string(show_schema_metadata=True)
        group = open_groups.setdefault(schema, [])
        if group and sum(other.nbytes for _, other in group) + table.nbytes > BUNDLE_BYTES:
            yield open_groups.pop(schema)
            group = open_groups.setdefault(schema, [])
        group.append((manifest, table))
    yield from open_groups.values()


def _write(filesystem: fs.FileSystem, folder: str, group: list[tuple[Manifest, pa.Table]]) -> set[str | None]:
    """Write one bundle: first the rows, then the manifests that make them count. Returns the keys in it."""
    path = f"{folder}/{FOLDER}/{uuid.uuid4().hex}.json"
    places: list[tuple[int, int]] = []

    def write_rows(stream: Any) -> None:
        at = 0
        with pq.ParquetWriter(stream, group[0][1].schema, compression="zstd", write_page_checksum=True) as writer:
            for _, table in group:
                if table.num_rows:
                    writer.write_table(table, row_group_size=table.num_rows)
                places.append((at, at + bool(table.num_rows)))
                at = places[-1][1]

    write_file(filesystem, _rows_of(path), write_rows)
    with filesystem.open_input_stream(_rows_of(path)) as stream:
        content = stream.read()
    name = f"../{FOLDER}/{_rows_of(path).rpartition('/')[2]}"
    shared = {"files": {name: len(content)}, "checksums": {name: f"{zlib.crc32(content):08x}"}}
    members = tuple(
        manifest.model_copy(update=shared | {"groups": place})
        for (manifest, _), place in zip(group, places, strict=True)
    )
    write_file(filesystem, path, sealed(Bundle(members=members)))
    return {manifest.refresh for manifest, _ in group}


def _delete_folder(filesystem: fs.FileSystem, folder: str) -> None:
    """Delete the folder, its marker first: without the marker, the bundle's record is the valid one."""
    for name in (MARKER, MANIFEST):
        filesystem.delete_file(f"{folder}/{name}")
    filesystem.delete_dir(folder)


def _has_dead_rows(filesystem: fs.FileSystem, path: str, members: Sequence[Manifest]) -> bool:
    try:
        groups: int = pq.read_metadata(_rows_of(path), filesystem=filesystem).num_row_groups
    except (OSError, pa.ArrowException):  # damaged or gone, which is for a reader to say
        return False
    return groups > sum(one.groups[1] - one.groups[0] for one in members if one.groups)


def _forget_doubles(filesystem: fs.FileSystem, asset: str, folder: str, known: set[str]) -> None:
    """Keep one record of a refresh if a killed process left two: that of its own folder, or else of the last bundle."""
    for path in reversed(_listed(filesystem, folder, ".json")):
        members = _read(filesystem, asset, path).members
        kept = tuple(member for member in members if member.refresh not in known)
        if len(kept) < len(members):
            write_file(filesystem, path, sealed(Bundle(members=kept)))
            _READ.pop(path, None)
        known |= {str(member.refresh) for member in kept}


def _delete_orphans(filesystem: fs.FileSystem, folder: str, held: dict[str, Any]) -> None:
    """Delete files of rows whose manifests were never written."""
    for rows in _listed(filesystem, folder, ".parquet"):
        if f"{rows.removesuffix('.parquet')}.json" not in held:
            filesystem.delete_file(rows)


def _rows_of(path: str) -> str:
    return f"{path.removesuffix('.json')}.parquet"


def _listed(filesystem: fs.FileSystem, folder: str, ending: str) -> list[str]:
    found = filesystem.get_file_info(fs.FileSelector(f"{folder}/{FOLDER}", allow_not_found=True))
    return sorted(one.path for one in found if one.base_name.endswith(ending) and one.base_name[0] != ".")


def _read(filesystem: fs.FileSystem, asset: str, path: str) -> Bundle:
    info = filesystem.get_file_info(path)
    written, known = (info.mtime_ns, info.size), _READ.get(path)
    if known is None or known[0] != written:
        try:
            with filesystem.open_input_stream(path) as stream:
                known = written, Bundle.model_validate(unsealed(stream.read()))
        except (OSError, ValueError):
            raise StorageError(f"{asset}: {path} cannot be read; restore it from a backup") from None
        _READ[path] = known
    return known[1]
