"""Whether a folder was written by `publish`, so that another publication may replace it and delete what is in it."""

import json
import re
from typing import Any

from pyarrow import fs

from operators.files.atomic import OBJECT_STORES, open_filesystem

CARD, LINEAGE, VERSIONS = "README.md", "lineage.json", "versions"
_KEYS = {"source", "teacher", "student", "outcomes"}  # of every lineage that was ever published
_VERSION = re.compile(r"[0-9a-f]{32}")


def why_foreign(folder: str) -> str:
    """Why a publication must not replace what is at `folder`; "" if it may, because it is ours, empty or not there.

    Args:
        folder: absolute path or URI.
    """
    filesystem, root = open_filesystem(folder.rstrip("/"))
    cure = "move it away, or give another storage=<folder>"
    match filesystem.get_file_info(root).type:
        case fs.FileType.NotFound:
            return ""
        case fs.FileType.File:
            return f"{folder} is a file, not a folder of published data; {cure}"
    found = filesystem.get_file_info(fs.FileSelector(root))
    if not found or (_versions_only if filesystem.type_name in OBJECT_STORES else _has_lineage)(filesystem, root):
        return ""
    names = ", ".join(sorted(info.base_name for info in found)[:5])
    return f"{folder} was not published by a run ({names}), and a publication would delete it; {cure}"


def _has_lineage(filesystem: fs.FileSystem, root: str) -> bool:
    path = f"{root}/{LINEAGE}"
    if filesystem.get_file_info(path).type != fs.FileType.File:
        return False
    with filesystem.open_input_stream(path) as stream:
        try:
            lineage: Any = json.loads(stream.read())
        except ValueError:
            return False
    return isinstance(lineage, dict) and lineage.keys() >= _KEYS


def _versions_only(filesystem: fs.FileSystem, root: str) -> bool:
    """In a bucket: only the card and the versions, which have no lineage if their publication was cut off."""
    names = {info.base_name for info in filesystem.get_file_info(fs.FileSelector(root))}
    below = filesystem.get_file_info(fs.FileSelector(f"{root}/{VERSIONS}", allow_not_found=True))
    return names <= {CARD, VERSIONS} and VERSIONS in names and all(_VERSION.fullmatch(one.base_name) for one in below)
