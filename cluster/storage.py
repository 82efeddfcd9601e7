"""Stores assets: a folder of Parquet files per asset, a manifest of what it was made from, and a marker written last.

New files of an asset are written next to the old ones, and replace them in one step, when the manifest is replaced. So
a build that fails leaves the old asset. A bucket cannot rename: there the new files keep a name of their own, which the
manifest holds. An asset without its `_SUCCESS` marker, or a file whose size is not that of the manifest, is never read.
A process verifies the checksum of each file once, before it reads it.
"""

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from pydantic import BaseModel, ValidationError
from ray.data import Dataset

from cluster.asset_files import swap_in, write_rows
from cluster.bundles import MOST_LOOSE, bundled, leave_bundle, leave_with_rows, tidy
from cluster.files import Part, StorageError, open_rows
from cluster.manifest import (
    MANIFEST,
    MARKER,
    Description,
    Manifest,
    current_manifest,
    fingerprint_of,
    read_manifest,
)
from cluster.memory import PeakMemory
from cluster.refresh_key import REFRESH_KEY, require_refresh_key
from cluster.verified import Verified
from operators.files.atomic import open_filesystem
from operators.files.places import in_bucket

ASIDE = ".making"  # folder of new files; readers of folders skip names that begin with a dot
Value = TypeVar("Value", bound=BaseModel)


@dataclass(frozen=True)
class Recipe:
    """How to make an asset; it is carried out only if the asset is stale.

    Attributes:
        build: makes the rows (a lazy Dataset, written as Parquet) or a value (a model or a JSON object, kept in the
            manifest).
        metrics: called with the rows or the value that was written; returns numbers for the manifest.
    """

    build: Callable[[], Dataset | BaseModel | Mapping[str, Any]]
    metrics: Callable[[Any], Mapping[str, Any]] = field(default=lambda _: {})


class AssetStore:
    """Writes and reads assets; `flows.staleness` decides whether one is stale."""

    def __init__(self, root: str) -> None:
        """Open a store at an absolute path or URI; assets lie under `<root>/assets/<asset>/[refresh=<key>/]`."""
        self._filesystem, self._root = open_filesystem(root)
        self._look: dict[Any, Any] | None = None  # inside `looking`: manifests by folder, keys by asset
        self._renames = not in_bucket(root)
        self._verified = Verified(self._filesystem)
        self.made: set[tuple[str, str | None]] = set()  # (asset, refresh) that this process has made

    def folder(self, asset: str, refresh: str | None) -> str:
        """Path of an asset within the store's file system.

        Raises:
            ValueError: the key cannot name a refresh.
        """
        return f"{self._root}/assets/{asset}" + ("" if refresh is None else f"/refresh={require_refresh_key(refresh)}")

    def manifest(self, asset: str, refresh: str | None = None) -> Manifest | None:
        """The record of a finished asset; None if it was never finished.

        Raises:
            StorageError: the record is there but cannot be read.
        """
        folder = self.folder(asset, refresh)
        if self._look is not None and folder in self._look:
            known: Manifest | None = self._look[folder]
            return known
        found = current_manifest(self._filesystem, asset, folder)
        if found is None and refresh is not None and not self._exists(f"{folder}/{MANIFEST}"):
            found = self._bundled(asset).get(refresh)
        if self._look is not None:
            self._look[folder] = found
        return found

    def held(self, asset: str, refresh: str) -> Manifest | None:
        """The record of the rows that are stored of a refresh, whether it is finished or not; None if there are none.

        Raises:
            StorageError: it cannot be read.
        """
        finished = self.manifest(asset, refresh)
        folder = self.folder(asset, refresh)
        if finished is not None or not self._exists(f"{folder}/{MANIFEST}"):
            return finished
        try:
            return read_manifest(self._filesystem, asset, folder)
        except StorageError:
            raise StorageError(
                f"{asset}: {folder}/{MANIFEST} cannot be read; restore it from a backup, or delete it and run again: "
                "rows of source files that are gone are lost then"
            ) from None

    def held_rows(self, asset: str, refresh: str, cure: str) -> Dataset:
        """The rows that are stored of a refresh, lazily, whether it is finished or not.

        Args:
            asset: its name.
            refresh: its key.
            cure: what to do if they are damaged.

        Raises:
            StorageError: there are none, or a file is missing or is not what was written.
        """
        held = self.held(asset, refresh)
        if held is None:
            raise StorageError(f"{asset}: {self.folder(asset, refresh)} holds no rows; make {asset} first")
        return open_rows(self._filesystem, self._verified.parts(asset, [(self.folder(asset, refresh), held)], cure))

    def _bundled(self, asset: str) -> dict[str, Manifest]:
        """The refreshes that are in bundles and have no folder."""
        look = {} if self._look is None else self._look
        if ("bundled", asset) not in look:
            look["bundled", asset] = bundled(self._filesystem, asset, self.folder(asset, None))
        known: dict[str, Manifest] = look["bundled", asset]
        return known

    def tidy(self, asset: str) -> None:
        """Bundle the asset's small refreshes if there are many; nothing in this process may be reading them lazily."""
        tidy(self._filesystem, asset, self.folder(asset, None), MOST_LOOSE)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Inside, each manifest is looked up once, however often it is asked for; assets that this process makes count.

        A pass over the fingerprints of a year of refreshes asks for thousands of manifests, each many times.
        """
        if self._look is not None:
            yield
            return
        self._look = {}
        try:
            yield
        finally:
            self._look = None

    def refreshes(self, asset: str) -> list[str]:
        """Keys of all finished refreshes of an asset, in the order in which they were first made."""
        if self._look is None:
            return self._in_order(asset, self.manifest)
        if asset not in self._look:
            self._look[asset] = self._in_order(asset, self.manifest)
        return list(self._look[asset])

    def held_refreshes(self, asset: str) -> list[str]:
        """Keys of all refreshes of which rows are stored, finished or not, in the order in which they were first made.

        Raises:
            StorageError: the record of one cannot be read.
        """
        return self._in_order(asset, self.held)

    def _in_order(self, asset: str, record_of: Callable[[str, str], Manifest | None]) -> list[str]:
        selector = fs.FileSelector(f"{self._root}/assets/{asset}", allow_not_found=True)
        names = [info.base_name for info in self._filesystem.get_file_info(selector)]
        own = [name.removeprefix("refresh=") for name in names if name.startswith("refresh=")]
        keys = dict.fromkeys([*own, *self._bundled(asset)])
        found = {key: made for key in keys if REFRESH_KEY.fullmatch(key) and (made := record_of(asset, key))}
        return sorted(found, key=lambda key: (found[key].order, key))

    def rows(self, asset: str, refreshes: Sequence[str | None]) -> Dataset:
        """The rows of a finished asset, lazily, from one or several refreshes.

        Raises:
            StorageError: it is not finished, or a file is missing or is not what was written.
        """
        with self.looking():
            finished = [(self.folder(asset, refresh), self._finished(asset, refresh)) for refresh in refreshes]
        return open_rows(self._filesystem, self._verified.parts(asset, finished))

    def value(self, asset: str, kind: type[Value]) -> Value:
        """The value of a finished asset without rows.

        Raises:
            StorageError: it is not finished, or an older version of the code made it.
        """
        try:
            return kind.model_validate(self._finished(asset, None).value)
        except ValidationError as error:
            place = self.folder(asset, None)
            problem = error.errors()[0]
            raise StorageError(
                f"{asset}: {place}/{MANIFEST}: value.{'.'.join(map(str, problem['loc']))}: {problem['msg']}; "
                f"delete {place}/{MARKER} and run again"
            ) from None

    def make(self, asset: str, refresh: str | None, recipe: Recipe, made_from: Description) -> Manifest:
        """Carry out a recipe; the old asset stays until the new one is complete. Returns the new manifest.

        Raises:
            Exception: whatever the recipe raises.
        """
        folder = self.folder(asset, refresh)
        aside = ASIDE if self._renames else uuid.uuid4().hex
        if self._renames:
            self._filesystem.create_dir(f"{folder}/{aside}")
            self._filesystem.delete_dir_contents(f"{folder}/{aside}")
        started = time.monotonic()
        with PeakMemory() as memory:
            made = recipe.build()
            if isinstance(made, Dataset):
                held = write_rows(self._filesystem, folder, aside, made, lambda: self._columns(asset))
                made = open_rows(self._filesystem, [Part(f"{folder}/{name}") for name in held["files"]])
            else:
                held = {"value": made.model_dump(mode="json") if isinstance(made, BaseModel) else dict(made)}
            metrics = dict(recipe.metrics(made))
        manifest = Manifest(
            asset=asset,
            refresh=refresh,
            order=0 if refresh is None else self._order(asset, refresh),
            fingerprint=fingerprint_of(made_from),
            made_from=made_from,
            seconds=round(time.monotonic() - started, 1),
            peak_memory_mib=memory.peak_mib,
            metrics=metrics,
            **held,
        )
        swap_in(self._filesystem, folder, aside, manifest, renames=self._renames)
        if refresh is not None:
            leave_bundle(self._filesystem, asset, self.folder(asset, None), refresh)
        self._forget(asset, folder)
        self.made.add((asset, refresh))
        return manifest

    def invalidate(self, asset: str, refresh: str | None) -> None:
        """Mark an asset as unfinished, so that the next run makes it again; its rows stay until then."""
        folder = self.folder(asset, refresh)
        made = self.manifest(asset, refresh)
        if made is not None and made.groups is not None:
            leave_with_rows(self._filesystem, self.folder(asset, None), made)
        elif refresh is not None:
            leave_bundle(self._filesystem, asset, self.folder(asset, None), refresh)
        if self._exists(f"{folder}/{MARKER}"):
            self._filesystem.delete_file(f"{folder}/{MARKER}")
        self._forget(asset, folder)

    def _forget(self, asset: str, folder: str) -> None:
        for key in (asset, folder, ("bundled", asset)):
            if self._look is not None:
                self._look.pop(key, None)

    def _exists(self, path: str) -> bool:
        return bool(self._filesystem.get_file_info(path).type != fs.FileType.NotFound)

    def _finished(self, asset: str, refresh: str | None) -> Manifest:
        manifest = self.manifest(asset, refresh)
        if manifest is None:
            raise StorageError(f"{asset}: {self.folder(asset, refresh)} has no {MARKER} marker; make {asset} first")
        return manifest

    def _order(self, asset: str, refresh: str) -> int:
        """The number of the refresh: the one in its manifest, also without a marker, else one above all others."""
        known = None
        with suppress(StorageError):
            known = self.held(asset, refresh)
        if known is not None and known.order:
            return known.order
        others = (self.manifest(asset, key) for key in self.refreshes(asset))
        return 1 + max((other.order for other in others if other), default=0)

    def _columns(self, asset: str) -> pa.Schema:
        made = [(self.folder(asset, key), self.manifest(asset, key)) for key in self.refreshes(asset)]
        paths = [path for folder, one in made if one is not None and one.rows for path in one.paths(folder)]
        return pq.read_schema(paths[0], filesystem=self._filesystem) if paths else pa.schema([])
