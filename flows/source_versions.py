"""The files of the source as refreshes know them: a name below `source.path`, and an identity of the content."""

import hashlib
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from flows.first_seen import FirstSeen
from operators.read.source_files import ALL_SPLITS, SourceFile, list_source_files

WHOLE_FILE_BYTES = 64 << 20  # larger files are identified by size, time and a hash of their first bytes
_UNSETTLED = FirstSeen()  # files that are young by this machine's clock, which may differ from the writer's


@dataclass(frozen=True)
class RefreshFile:
    """A source file.

    Attributes:
        path: absolute, or a URI.
        name: relative to `source.path`.
        identity: identifies its content; "" if this process may not read it.
        changed: when it was written, Unix time; None if unknown.
    """

    path: str
    name: str
    identity: str
    changed: float | None


def source_files(path: str, settle_s: float = 0, split: str = ALL_SPLITS) -> list[RefreshFile]:
    """The files of one split of the source; one that changed less than `settle_s` ago may be half copied, and waits.

    A file also counts as settled after this process has seen it unchanged for `settle_s`, because its time may lie in
    the future: its writer's clock was wrong, or this machine's was set back.

    Raises:
        ValueError: there is no file that can be read.
    """
    return [
        RefreshFile(file.path, file.name, _identity_or_none(file), _changed(file))
        for file in list_source_files(path, split)
        if _is_settled(file, settle_s)
    ]


def _changed(file: SourceFile) -> float | None:
    return None if file.mtime_ns is None else file.mtime_ns / 1e9


def _is_settled(file: SourceFile, settle_s: float) -> bool:
    changed = _changed(file)  # None: an object store without times, which shows only whole objects
    if settle_s <= 0 or changed is None or time.time() - changed >= settle_s:
        return True
    return _UNSETTLED.seconds(file.path, (file.size, file.mtime_ns)) >= settle_s


def _identity_or_none(file: SourceFile) -> str:
    try:
        return _identity(file)
    except OSError:  # forbidden, deleted since it was listed, or on a failing disk: a later look may succeed
        return ""


@lru_cache(maxsize=100_000)  # a daemon looks at the same files again and again, but reads each only once
def _identity(file: SourceFile) -> str:
    local = Path(file.path.removeprefix("file://"))
    if not local.is_file():
        return f"{file.size} bytes of {file.mtime_ns}"
    with local.open("rb") as stream:
        digest = hashlib.sha256(stream.read(WHOLE_FILE_BYTES)).hexdigest()[:16]
    return digest if file.size <= WHOLE_FILE_BYTES else f"{digest} {file.size} bytes of {file.mtime_ns}"
