"""What each asset is made from, as plain JSON: its code version, its configuration, its inputs.

Two equal descriptions mean that the asset need not be made again. Paths take no part: a file is known by its name and
content, so that the same data in an uploaded copy of the working directory is the same data.
"""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import dagster as dg

from cluster.storage import AssetStore, fingerprint_of
from flows.config import RunConfig
from flows.graph import CONFIG_KEYS, RAW_INSTRUCTIONS
from operators.read.source_files import SourceFile, list_source_files

WHOLE_FILE_BYTES = 64 << 20  # larger files are known by size, time and their first bytes


@dataclass(frozen=True)
class RefreshFile:
    """A source file; `identity` tells its content from any other, `changed` is when it was written (Unix time)."""

    path: str
    name: str
    identity: str
    changed: float | None


def source_files(path: str, settle_s: float = 0) -> list[RefreshFile]:
    """All files of the source, with names relative to the folder that holds them all.

    A file that changed less than `settle_s` ago may still be being copied, and is left out.
    """
    found = list_source_files(path)
    parents = {str(Path(file.path).parent) for file in found}
    shared = min(parents, key=len) if parents else ""
    return [
        RefreshFile(file.path, file.path.removeprefix(shared).lstrip("/"), _identity(file), _changed(file))
        for file in found
        if _is_settled(file, settle_s)
    ]


class Describer:
    """Describes any asset of a graph under one configuration; the store tells what other refreshes have taken."""

    def __init__(self, config: RunConfig, specs: Mapping[str, dg.AssetSpec], settle_s: float = 0) -> None:
        """Open the store that belongs to the configuration; source files younger than `settle_s` are not there yet."""
        self._config = config
        self._specs = specs
        self._settle_s = settle_s
        self.store = AssetStore(config.storage, self.describe)

    def describe(self, asset: str, refresh: str | None) -> dict[str, Any]:
        """Code version, configuration and inputs of an asset; see the module."""
        spec = self._specs[asset]
        sections = {name: getattr(self._config, name).identity() for name in spec.metadata.get(CONFIG_KEYS, [])}
        described: dict[str, Any] = {"code": spec.code_version, "config": sections, "inputs": {}}
        if asset == RAW_INSTRUCTIONS:
            described["files"] = [[file.name, file.identity] for file in self.files_of(refresh)]
        for parent in sorted(dep.asset_key.to_user_string() for dep in spec.deps):
            described["inputs"] |= self._input(parent, refresh)
        return described

    def files_of(self, refresh: str | None) -> list[RefreshFile]:
        """The files of a refresh: those that it took before, and those that no other refresh has taken."""
        taken = {
            (name, identity)
            for key in self.store.refreshes(RAW_INSTRUCTIONS)
            if key != refresh
            for name, identity in (self.store.manifest(RAW_INSTRUCTIONS, key) or {})["made_from"]["files"]
        }
        return [file for file in self._source_files if (file.name, file.identity) not in taken]

    @cached_property
    def _source_files(self) -> list[RefreshFile]:
        return source_files(self._config.source.path, self._settle_s)

    def _input(self, parent: str, refresh: str | None) -> dict[str, str]:
        if self._specs[parent].partitions_def is None:
            return {parent: fingerprint_of(self.describe(parent, None))}
        if refresh is not None:
            return {parent: fingerprint_of(self.describe(parent, refresh))}
        # An unpartitioned asset reads every finished refresh as it is, whatever configuration made it.
        manifests = {key: self.store.manifest(parent, key) for key in self.store.refreshes(parent)}
        return {f"{parent}[{key}]": manifest["fingerprint"] for key, manifest in manifests.items() if manifest}


def _changed(file: SourceFile) -> float | None:
    return None if file.mtime_ns is None else file.mtime_ns / 1e9


def _is_settled(file: SourceFile, settle_s: float) -> bool:
    changed = _changed(file)  # an object store shows only whole objects, whether it tells their time or not
    return settle_s <= 0 or changed is None or time.time() - changed >= settle_s


@lru_cache(maxsize=100_000)  # a daemon looks at the same files again and again, and reads each only once
def _identity(file: SourceFile) -> str:
    local = Path(file.path.removeprefix("file://"))
    if not local.is_file():
        return f"{file.size} bytes of {file.mtime_ns}"
    with local.open("rb") as stream:
        digest = hashlib.sha256(stream.read(WHOLE_FILE_BYTES)).hexdigest()[:16]
    return digest if file.size <= WHOLE_FILE_BYTES else f"{digest} {file.size} bytes of {file.mtime_ns}"
