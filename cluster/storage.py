"""Where assets live: a folder of Parquet an asset, a manifest of what it was made from, and a marker written last.

An asset returns a `Recipe`, not data. The store compares the asset's fingerprint (code, configuration, inputs) with the
manifest of what is already there, and carries the plan out only if they differ: finished work costs nothing. Whatever
lacks its `_SUCCESS` marker, or is not the size that its manifest says, is never read.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dagster as dg
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import ray
from pyarrow import fs
from ray.data import Dataset

from cluster.memory import PeakMemory

MARKER, MANIFEST = "_SUCCESS", "manifest.json"
ID_WORDS = 8  # of eight bytes: as much of a row's id as is looked at
Description = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How to make an asset: called only if the asset is stale.

    Attributes:
        build: makes the rows (a lazy Dataset, written as Parquet) or the metrics (a JSON object, kept in the manifest).
        metrics: called with what was written; the numbers that it returns are kept in the manifest.
    """

    build: Callable[[], Dataset | Mapping[str, Any]]
    metrics: Callable[[Any], Mapping[str, Any]] = field(default=lambda _: {})


def fingerprint_of(description: Description) -> str:
    """A short hash of everything that an asset was made from."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def sum_of_ids(row_ids: pa.Array) -> npt.NDArray[np.uint64]:
    """Sums of the ids' bytes, word by word: equal for the same rows in any order, not for one lost and one doubled."""
    padded = np.asarray(row_ids.to_pylist(), dtype=f"S{8 * ID_WORDS}")
    summed: npt.NDArray[np.uint64] = padded.view(np.uint64).reshape(-1, ID_WORDS).sum(axis=0, dtype=np.uint64)
    return summed


class AssetStore(dg.IOManager):
    """Dagster's IO manager for all assets, and the reader of their manifests for everyone else."""

    def __init__(self, root: str, describe: Callable[[str, str | None], Description]) -> None:
        """Open a store.

        Args:
            root: absolute path or URI; assets lie under `<root>/assets/<asset>/[refresh=<key>/]`.
            describe: (asset, refresh) -> what it is made from, as plain JSON; decides whether it is stale.
        """
        self._filesystem, self._root = fs.FileSystem.from_uri(root)
        self._describe = describe
        self.made_again: set[str] = set()  # assets that are made even if they are not stale
        self.made: set[tuple[str, str | None]] = set()  # (asset, refresh) that this process made rather than found

    def folder(self, asset: str, refresh: str | None) -> str:
        """Path of an asset within the store's file system."""
        return f"{self._root}/assets/{asset}" + (f"/refresh={refresh}" if refresh else "")

    def manifest(self, asset: str, refresh: str | None = None) -> dict[str, Any] | None:
        """What a finished asset was made from and holds; None if it was never finished."""
        folder = self.folder(asset, refresh)
        if self._filesystem.get_file_info(f"{folder}/{MARKER}").type == fs.FileType.NotFound:
            return None
        with self._filesystem.open_input_stream(f"{folder}/{MANIFEST}") as stream:
            manifest: dict[str, Any] = json.loads(stream.read())
        return manifest

    def refreshes(self, asset: str) -> list[str]:
        """Keys of all finished refreshes of a partitioned asset, sorted."""
        selector = fs.FileSelector(f"{self._root}/assets/{asset}", allow_not_found=True)
        names = [info.base_name for info in self._filesystem.get_file_info(selector)]
        keys = sorted(name.removeprefix("refresh=") for name in names if name.startswith("refresh="))
        return [key for key in keys if self.manifest(asset, key) is not None]

    def describe(self, asset: str, refresh: str | None) -> Description:
        """What the asset would be made from if it were made now."""
        return self._describe(asset, refresh)

    def current_fingerprint(self, asset: str, refresh: str | None = None) -> str:
        """The fingerprint that the asset would have if it were made now."""
        return fingerprint_of(self._describe(asset, refresh))

    def handle_output(self, context: dg.OutputContext, obj: Recipe) -> None:
        """Carry out the plan if the asset is stale, and tell Dagster what is there now."""
        asset = context.asset_key.to_user_string()
        refresh = context.asset_partition_key if context.has_asset_partitions else None
        description = self._describe(asset, refresh)
        manifest = self.manifest(asset, refresh)
        stale = manifest is None or manifest["fingerprint"] != fingerprint_of(description)
        if manifest is None or stale or asset in self.made_again:
            manifest = self._make(asset, refresh, obj, description)
            self.made.add((asset, refresh))
        shown = {name: manifest[name] for name in ("rows", "outcomes", "metrics", "seconds") if manifest.get(name)}
        context.add_output_metadata({**shown, "fingerprint": manifest["fingerprint"]})

    def load_input(self, context: dg.InputContext) -> Dataset | dict[str, Any]:
        """The asset's rows, lazily, or its metrics; of a partitioned asset for an unpartitioned one, all refreshes."""
        asset = context.asset_key.to_user_string()
        if not context.has_asset_partitions:
            return self._read(asset, None)
        keys = list(context.asset_partition_keys)
        if len(keys) == 1:
            return self._read(asset, keys[0])
        return self.rows(asset, self.refreshes(asset))

    def rows(self, asset: str, refreshes: Sequence[str | None]) -> Dataset:
        """The rows of a finished asset, lazily; of several refreshes together.

        Raises:
            FileNotFoundError: it is not finished, or a file is missing or of another size than the manifest says.
        """
        files: list[str] = []
        for refresh in refreshes:
            files += self._checked(asset, self.folder(asset, refresh), self._finished(asset, refresh)["files"])
        return self._open(files)

    def _read(self, asset: str, refresh: str | None) -> Dataset | dict[str, Any]:
        manifest = self._finished(asset, refresh)
        value: dict[str, Any] | None = manifest.get("value")
        return self.rows(asset, [refresh]) if value is None else value

    def _finished(self, asset: str, refresh: str | None) -> dict[str, Any]:
        manifest = self.manifest(asset, refresh)
        if manifest is None:
            raise FileNotFoundError(
                f"{asset}: {self.folder(asset, refresh)} has no {MARKER} marker; materialise it again"
            )
        return manifest

    def _open(self, files: list[str]) -> Dataset:
        return ray.data.read_parquet(files, filesystem=self._filesystem, partitioning=None)

    def _checked(self, asset: str, folder: str, sizes: dict[str, int]) -> list[str]:
        paths = {f"{folder}/{name}": size for name, size in sizes.items()}
        for info in self._filesystem.get_file_info(list(paths)):
            if info.size != paths[info.path]:
                raise FileNotFoundError(
                    f"{asset}: {info.path} has {info.size} bytes, its manifest says {paths[info.path]}; "
                    f"delete {folder}/{MARKER} and run again"
                )
        return list(paths)

    def _make(self, asset: str, refresh: str | None, plan: Recipe, description: Description) -> dict[str, Any]:
        folder = self.folder(asset, refresh)
        if self._filesystem.get_file_info(f"{folder}/{MARKER}").type != fs.FileType.NotFound:
            self._filesystem.delete_file(f"{folder}/{MARKER}")
        self._filesystem.create_dir(folder)
        self._filesystem.delete_dir_contents(folder)
        started = time.monotonic()
        with PeakMemory() as memory:
            made = plan.build()
            held = self._write_rows(folder, made) if isinstance(made, Dataset) else {"value": dict(made)}
            written = made if "value" in held else self._open([f"{folder}/{name}" for name in held["files"]])
            metrics = dict(plan.metrics(written))
        manifest = {
            "asset": asset,
            "refresh": refresh,
            "fingerprint": fingerprint_of(description),
            "made_from": description,
            "seconds": round(time.monotonic() - started, 1),
            "peak_memory_mib": memory.peak_mib,
            **held,
            "metrics": metrics,
        }
        self._put(f"{folder}/{MANIFEST}", json.dumps(manifest, indent=1, sort_keys=True))
        self._put(f"{folder}/{MARKER}", "")
        return manifest

    def _write_rows(self, folder: str, rows: Dataset) -> dict[str, Any]:
        rows.write_parquet(folder, filesystem=self._filesystem)
        found = self._filesystem.get_file_info(fs.FileSelector(folder))
        files = {info.base_name: info.size for info in found if info.base_name.endswith(".parquet")}
        if not files:  # Ray writes no file for no rows; a reader still needs the columns
            schema = rows.schema()
            empty = (schema.base_schema if schema is not None else pa.schema([])).empty_table()
            pq.write_table(empty, f"{folder}/part-empty.parquet", filesystem=self._filesystem)
            files = {"part-empty.parquet": self._filesystem.get_file_info(f"{folder}/part-empty.parquet").size}
        return {"files": files, **self._count([f"{folder}/{name}" for name in files])}

    def _count(self, files: list[str]) -> Description:
        """`rows`, `outcomes` (rows by outcome), `ids` (a sum over all row ids); reads two columns in batches."""
        data = pads.dataset(files, filesystem=self._filesystem, format="parquet")
        if "outcome" not in data.schema.names:
            return {"rows": data.count_rows(), "outcomes": {}}
        named = "row_id" in data.schema.names
        outcomes: Counter[str] = Counter()
        ids = np.zeros(ID_WORDS, np.uint64)
        for batch in data.to_batches(columns=["outcome", *(["row_id"] if named else [])]):
            outcomes.update({item["values"]: item["counts"] for item in batch["outcome"].value_counts().to_pylist()})
            ids += sum_of_ids(batch["row_id"]) if named else 0
        summed = {"ids": ids.tobytes().hex()} if named else {}
        return {"rows": outcomes.total(), "outcomes": dict(sorted(outcomes.items())), **summed}

    def _put(self, path: str, text: str) -> None:
        with self._filesystem.open_output_stream(path) as stream:
            stream.write(text.encode())
