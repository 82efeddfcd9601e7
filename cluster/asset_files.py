"""Writes the files of one asset: rows beside the old ones, then all of them in their place at once.

The manifest names the files that count. So a process that is killed at any point leaves the old asset or the new one.
"""

import uuid
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from ray.data import Dataset

from cluster.counts import count_rows
from cluster.files import checksums
from cluster.manifest import MANIFEST, MARKER, Manifest, forget_manifest
from operators.files.atomic import write_file
from operators.files.seals import sealed


def write_rows(
    filesystem: fs.FileSystem, folder: str, aside: str, rows: Dataset, columns: Callable[[], pa.Schema]
) -> dict[str, Any]:
    """Write rows as Parquet below `folder/aside`.

    Args:
        filesystem: of the folder.
        folder: of the asset.
        aside: name of the folder of new files.
        rows: any columns.
        columns: called for the columns if there are no rows and the data set has lost its own.

    Returns:
        The manifest's fields about files and rows; names of files are relative to `folder`.
    """
    rows.write_parquet(f"{folder}/{aside}", filesystem=filesystem)
    listed = filesystem.get_file_info(fs.FileSelector(f"{folder}/{aside}", allow_not_found=True))
    files = {f"{aside}/{info.base_name}": info.size for info in listed if info.base_name.endswith(".parquet")}
    if not files:  # Ray writes no file if there are no rows; a reader still needs the columns
        schema = rows.schema()
        empty = (schema.base_schema if schema is not None and schema.names else columns()).empty_table()
        name = f"{aside}/empty-{uuid.uuid4().hex}.parquet"
        pq.write_table(empty, f"{folder}/{name}", filesystem=filesystem)
        files = {name: filesystem.get_file_info(f"{folder}/{name}").size}
    paths = [f"{folder}/{name}" for name in files]
    found = checksums(filesystem, paths, sum(files.values()))
    return {"files": files, "checksums": dict(zip(files, found, strict=True)), **count_rows(filesystem, paths)}


def swap_in(filesystem: fs.FileSystem, folder: str, aside: str, manifest: Manifest, *, renames: bool) -> None:
    """Put the new files in their place, then write the manifest that names them, then delete the old ones.

    Args:
        filesystem: of the folder.
        folder: of the asset.
        aside: name of the folder of new files.
        manifest: names the files below `aside`.
        renames: whether the file system can rename; otherwise the files stay below `aside`.
    """
    if renames:
        for name in manifest.files:
            filesystem.move(f"{folder}/{name}", f"{folder}/{_last(name)}")
        moved = {
            key: {_last(name): value for name, value in getattr(manifest, key).items()}
            for key in ("files", "checksums")
        }
        manifest = manifest.model_copy(update=moved)
    write_file(filesystem, f"{folder}/{MANIFEST}", sealed(manifest))
    write_file(filesystem, f"{folder}/{MARKER}", b"")
    forget_manifest(filesystem, folder)
    for info in filesystem.get_file_info(fs.FileSelector(folder)):
        if info.type == fs.FileType.Directory and (renames or info.base_name != aside):
            filesystem.delete_dir(info.path)
        elif info.type == fs.FileType.File and info.base_name not in {*manifest.files, MANIFEST, MARKER}:
            filesystem.delete_file(info.path)


def _last(name: str) -> str:
    return name.rpartition("/")[2]
