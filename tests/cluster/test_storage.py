"""Assets are made once, never read half-written, and made again when what they were made from changes."""

import hashlib
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pytest
import ray

from cluster.storage import MARKER, AssetStore, Recipe, sum_of_ids

REFRESHES = dg.DynamicPartitionsDefinition(name="refresh")


class World:
    """Two assets, one partitioned, whose description the test can change; counts how often each was made."""

    def __init__(self, root: Path) -> None:
        self.version = "1"
        self.made: list[str] = []
        self.store = AssetStore(str(root), lambda asset, refresh: {"asset": asset, "code": self.version})

    def rows(self, refresh: str) -> "ray.data.Dataset":
        self.made.append(refresh)
        return ray.data.from_arrow(pa.table({"row": [f"{refresh}{n}" for n in range(3)], "outcome": ["", "", "bad"]}))

    def materialise(self, refresh: str, instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
        @dg.asset(partitions_def=REFRESHES)
        def source(context: dg.AssetExecutionContext) -> Recipe:
            return Recipe(lambda: self.rows(context.partition_key))

        @dg.asset
        def summary(source: ray.data.Dataset) -> Recipe:
            return Recipe(lambda: {"rows": source.count()}, metrics=lambda value: {"seen": value["rows"]})

        instance.add_dynamic_partitions("refresh", [refresh])
        return dg.materialize(
            [source, summary],
            partition_key=refresh,
            instance=instance,
            resources={"io_manager": self.store},
            raise_on_error=False,
        )


@pytest.fixture
def world(tmp_path: Path, local_ray: None) -> World:
    return World(tmp_path / "store")


@pytest.fixture
def instance(tmp_path: Path) -> Any:
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster")) as instance:
        yield instance


def test_finished_work_is_not_made_again_until_its_description_changes(world: World, instance: Any) -> None:
    assert world.materialise("a", instance).success
    assert world.materialise("a", instance).success
    assert world.made == ["a"]
    world.version = "2"
    assert world.materialise("a", instance).success
    assert world.made == ["a", "a"]


def test_manifest_counts_rows_and_outcomes(world: World, instance: Any) -> None:
    world.materialise("a", instance)
    manifest = world.store.manifest("source", "a")
    assert manifest is not None
    assert (manifest["rows"], manifest["outcomes"]) == (3, {"": 2, "bad": 1})
    assert manifest["made_from"] == {"asset": "source", "code": "1"}
    summary = world.store.manifest("summary")
    assert summary is not None
    assert summary["metrics"] == {"seen": 3}


def test_an_unpartitioned_asset_reads_all_refreshes(world: World, instance: Any) -> None:
    world.materialise("a", instance)
    world.version = "2"
    world.materialise("b", instance)
    summary = world.store.manifest("summary")
    assert summary is not None
    assert summary["value"] == {"rows": 6}


def test_an_asset_without_its_marker_is_not_read(world: World, instance: Any) -> None:
    world.materialise("a", instance)
    Path(world.store.folder("source", "a"), MARKER).unlink()
    with pytest.raises(FileNotFoundError, match="has no _SUCCESS marker; materialise it again"):
        world.store.rows("source", ["a"])
    assert world.store.refreshes("source") == []


@pytest.mark.parametrize("damage", [b"", None], ids=["emptied", "removed"])
def test_a_damaged_file_is_named(world: World, instance: Any, damage: bytes | None) -> None:
    world.materialise("a", instance)
    file = next(Path(world.store.folder("source", "a")).glob("*.parquet"))
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage)
    with pytest.raises(FileNotFoundError, match=f"{file.name} has (0|None) bytes, its manifest says"):
        world.store.rows("source", ["a"])


def test_a_failed_plan_leaves_nothing_that_can_be_read(world: World, instance: Any) -> None:
    def fail(refresh: str) -> Any:
        raise OSError("disk full")

    world.rows = fail  # type: ignore[method-assign]
    assert not world.materialise("a", instance).success
    assert world.store.manifest("source", "a") is None


def test_an_asset_without_rows_still_has_columns(tmp_path: Path, local_ray: None, instance: Any) -> None:
    store = AssetStore(str(tmp_path / "store"), lambda asset, refresh: {})

    @dg.asset
    def empty() -> Recipe:
        rows = ray.data.from_arrow(pa.table({"row": ["x"], "outcome": ["y"]}))
        return Recipe(lambda: rows.filter(expr=ray.data.expressions.col("row") == "none"))

    assert dg.materialize([empty], instance=instance, resources={"io_manager": store}).success
    assert store.rows("empty", [None]).columns() == ["row", "outcome"]
    assert store.rows("empty", [None]).count() == 0


def test_the_sum_of_ids_knows_rows_in_any_order_and_misses_none() -> None:
    ids = [hashlib.sha256(str(number).encode()).hexdigest()[:32] for number in range(1000)]
    known = sum_of_ids(pa.array(ids)).tolist()
    assert sum_of_ids(pa.array(ids[::-1])).tolist() == known
    assert (sum_of_ids(pa.array(ids[:400])) + sum_of_ids(pa.array(ids[400:]))).tolist() == known
    assert sum_of_ids(pa.array([*ids[1:], ids[1]])).tolist() != known
    assert not sum_of_ids(pa.array([], pa.string())).any()
