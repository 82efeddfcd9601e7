"""Assets are never read half-written, a failed build leaves what was there, and damage is named with its cure."""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from pydantic import BaseModel, ConfigDict

from cluster import storage
from cluster.files import StorageError
from cluster.manifest import Manifest
from cluster.storage import MARKER, AssetStore, Recipe
from operators.files.atomic import put_file
from operators.files.copies import files_below

MADE_FROM = {"code": "1"}


class Loss(BaseModel):
    """A value of an asset."""

    model_config = ConfigDict(frozen=True)

    base: float
    student: float


def rows_of(name: str) -> "ray.data.Dataset":
    return ray.data.from_arrow(pa.table({"row": [f"{name}{n}" for n in range(3)], "outcome": ["", "", "bad"]}))


def fail() -> Any:
    raise OSError("disk full")


@pytest.fixture
def store(tmp_path: Path, local_ray: None) -> AssetStore:
    return AssetStore(str(tmp_path / "store"))


def again(store: AssetStore) -> AssetStore:
    """Open the same storage anew, as the next process does."""
    return AssetStore(str(Path(store.folder("x", None)).parents[1]))


def texts(store: AssetStore, refresh: str = "a") -> list[str]:
    return sorted(row["row"] for row in store.rows("source", [refresh]).take_all())


def test_the_manifest_says_what_an_asset_holds_and_what_it_was_made_from(store: AssetStore) -> None:
    store.make("source", "a", Recipe(lambda: rows_of("a"), metrics=lambda rows: {"seen": rows.count()}), MADE_FROM)
    manifest = again(store).manifest("source", "a")
    assert manifest is not None
    assert (manifest.rows, manifest.outcomes) == (3, {"": 2, "bad": 1})
    assert (manifest.made_from, manifest.metrics) == (MADE_FROM, {"seen": 3})
    assert store.made == {("source", "a")}


def test_a_value_is_read_back_as_the_same_model(store: AssetStore) -> None:
    store.make("losses", None, Recipe(lambda: Loss(base=2.5, student=2.25)), MADE_FROM)
    assert again(store).value("losses", Loss) == Loss(base=2.5, student=2.25)


def test_a_value_of_an_older_version_is_named_with_its_cure(store: AssetStore) -> None:
    store.make("losses", None, Recipe(lambda: {"base": 2.5}), MADE_FROM)
    with pytest.raises(StorageError, match=r"losses: .*value.student: Field required; delete .*_SUCCESS and run again"):
        again(store).value("losses", Loss)


def test_a_build_that_fails_leaves_what_was_there(store: AssetStore) -> None:
    store.make("source", "a", Recipe(lambda: rows_of("old")), MADE_FROM)
    with pytest.raises(OSError, match="disk full"):
        store.make("source", "a", Recipe(fail), {"code": "2"})
    assert texts(again(store)) == ["old0", "old1", "old2"]
    store.make("source", "a", Recipe(lambda: rows_of("new")), {"code": "2"})
    assert texts(again(store)) == ["new0", "new1", "new2"]
    left = {path.name for path in Path(store.folder("source", "a")).iterdir()}
    manifest = store.manifest("source", "a")
    assert manifest is not None
    assert left == {*manifest.files, "manifest.json", MARKER}


def test_a_first_build_that_fails_leaves_nothing_that_can_be_read(store: AssetStore) -> None:
    with pytest.raises(OSError, match="disk full"):
        store.make("source", "a", Recipe(fail), MADE_FROM)
    assert again(store).manifest("source", "a") is None
    assert again(store).refreshes("source") == []


def test_an_asset_can_be_made_from_its_own_old_rows(store: AssetStore) -> None:
    store.make("source", "a", Recipe(lambda: rows_of("old")), MADE_FROM)
    store.make("source", "a", Recipe(lambda: store.rows("source", ["a"])), {"code": "2"})
    assert texts(again(store)) == ["old0", "old1", "old2"]


def test_refreshes_keep_the_order_in_which_they_were_first_made(store: AssetStore) -> None:
    for key in ("z", "a", "m"):
        store.make("source", key, Recipe(lambda: rows_of("x")), MADE_FROM)
    store.make("source", "z", Recipe(lambda: rows_of("y")), {"code": "2"})
    store.invalidate("source", "a")
    store.make("source", "a", Recipe(lambda: rows_of("y")), {"code": "2"})
    assert again(store).refreshes("source") == ["z", "a", "m"]


def test_an_invalid_asset_counts_as_unfinished(store: AssetStore) -> None:
    store.make("source", "a", Recipe(lambda: rows_of("a")), MADE_FROM)
    store.invalidate("source", "a")
    assert store.manifest("source", "a") is None
    with pytest.raises(StorageError, match=r"source: .*refresh=a has no _SUCCESS marker; make source first"):
        again(store).rows("source", ["a"])


def test_an_unfinished_refresh_still_holds_its_rows_and_its_place(store: AssetStore) -> None:
    for key in ("b", "a"):
        store.make("source", key, Recipe(partial(rows_of, key)), MADE_FROM)
    made = store.manifest("source", "b")
    store.invalidate("source", "b")
    later = again(store)
    assert later.held("source", "b") == made
    assert (later.refreshes("source"), later.held_refreshes("source")) == (["a"], ["b", "a"])
    assert sorted(row["row"] for row in later.held_rows("source", "b", "pray").take_all()) == ["b0", "b1", "b2"]
    with pytest.raises(StorageError, match="no rows; make source first"):
        later.held_rows("source", "c", "pray")
    assert later.held("source", "c") is None
    next(Path(store.folder("source", "b")).glob("*.parquet")).write_bytes(b"")
    with pytest.raises(StorageError, match=r"has 0 bytes, its manifest says \d+; pray"):
        later.held_rows("source", "b", "pray")
    Path(store.folder("source", "b"), "manifest.json").write_text("{")
    with pytest.raises(StorageError, match="restore it from a backup, or delete it and run again: rows of source"):
        later.held("source", "b")


@pytest.mark.parametrize("damage", [b"", None], ids=["emptied", "removed"])
def test_a_file_of_another_size_is_named(store: AssetStore, damage: bytes | None) -> None:
    store.make("source", "a", Recipe(lambda: rows_of("a")), MADE_FROM)
    file = next(Path(store.folder("source", "a")).glob("*.parquet"))
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage)
    with pytest.raises(StorageError, match=rf"source: .*{file.name} has (0|None) bytes, its manifest says \d+; delete"):
        store.rows("source", ["a"])


def test_a_flipped_bit_is_never_read_as_data(store: AssetStore) -> None:
    rows = pa.table({"row": [hashlib.sha256(str(n).encode()).hexdigest() for n in range(2000)], "outcome": [""] * 2000})
    store.make("source", "a", Recipe(lambda: ray.data.from_arrow(rows)), MADE_FROM)
    file = next(Path(store.folder("source", "a")).glob("*.parquet"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(bytes(content))
    with pytest.raises(StorageError, match=rf"source: {file} is damaged: .* delete .*_SUCCESS and run again"):
        again(store).rows("source", ["a"])


@pytest.mark.parametrize("content", ["", "{", '{"rows": 3}'], ids=["empty", "cut off", "without a fingerprint"])
def test_a_broken_manifest_is_named_with_its_cure(store: AssetStore, content: str) -> None:
    store.make("source", "a", Recipe(lambda: rows_of("a")), MADE_FROM)
    path = Path(store.folder("source", "a"), "manifest.json")
    path.write_text(content)
    with pytest.raises(StorageError, match=rf"source: {path} cannot be read; delete .*_SUCCESS and run again"):
        again(store).manifest("source", "a")


def test_a_manifest_of_an_older_version_is_read(store: AssetStore) -> None:
    store.make("source", "a", Recipe(lambda: rows_of("a"), metrics=lambda _: {"calls": 3}), MADE_FROM)
    path = Path(store.folder("source", "a"), "manifest.json")
    held = json.loads(path.read_text())
    held["figures"] = held.pop("metrics")
    del held["order"], held["seal"]
    path.write_text(json.dumps(held))
    manifest = again(store).manifest("source", "a")
    assert manifest is not None
    assert (manifest.metrics, manifest.order) == ({"calls": 3}, 0)


def test_an_asset_without_rows_still_has_columns(store: AssetStore) -> None:
    rows = ray.data.from_arrow(pa.table({"row": ["x"], "outcome": ["y"]}))
    store.make("empty", None, Recipe(lambda: rows.filter(expr=ray.data.expressions.col("row") == "none")), MADE_FROM)
    assert store.rows("empty", [None]).columns() == ["row", "outcome"]
    assert store.rows("empty", [None]).count() == 0


def test_a_look_reads_each_manifest_once_and_sees_what_is_made_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AssetStore(str(tmp_path))
    folder = Path(store.folder("raw", "a"))
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(Manifest(order=1, fingerprint="0").model_dump_json())
    (folder / "_SUCCESS").touch()
    looked: list[str] = []
    look = storage.current_manifest
    monkeypatch.setattr(storage, "current_manifest", lambda *place: looked.append(place[2]) or look(*place))
    with store.looking():
        for _ in range(5):
            assert store.refreshes("raw") == ["a"]
            assert store.manifest("raw", "a") is not None
        assert len(looked) == 1
        store.invalidate("raw", "a")
        assert store.manifest("raw", "a") is None
        assert store.refreshes("raw") == []
    (folder / "_SUCCESS").touch()
    assert store.refreshes("raw") == ["a"], "outside, nothing is remembered"


def test_in_a_bucket_too_a_build_that_fails_leaves_what_was_there(bucket: str, local_ray: None) -> None:
    store, place = AssetStore(f"{bucket}/runs"), f"{bucket}/runs/assets/source/refresh=a"
    for name in ("first", "old"):
        store.make("source", "a", Recipe(lambda name=name: rows_of(name)), MADE_FROM)  # type: ignore[misc]

    def cut_off(_: Any) -> dict[str, int]:
        raise OSError("connection lost")  # after the rows were written

    with pytest.raises(OSError, match="connection lost"):
        store.make("source", "a", Recipe(lambda: rows_of("new"), metrics=cut_off), MADE_FROM)
    assert texts(AssetStore(f"{bucket}/runs")) == ["old0", "old1", "old2"]
    assert len({name.split("/")[0] for name in files_below(place) if name.endswith(".parquet")}) == 2
    made = store.make("source", "a", Recipe(lambda: rows_of("new")), MADE_FROM)
    assert texts(store) == ["new0", "new1", "new2"]
    assert set(files_below(place)) == {*made.files, "manifest.json", MARKER}


def test_in_a_bucket_refreshes_invalid_and_damaged_assets_are_known_too(bucket: str, local_ray: None) -> None:
    store = AssetStore(f"{bucket}/runs")
    assert store.refreshes("source") == []
    for key in ("b", "a"):
        store.make("source", key, Recipe(lambda key=key: rows_of(key)), MADE_FROM)  # type: ignore[misc]
    assert AssetStore(f"{bucket}/runs").refreshes("source") == ["b", "a"]
    [name] = store.make("source", "c", Recipe(lambda: rows_of("c").repartition(1)), MADE_FROM).files
    put_file(f"{bucket}/runs/assets/source/refresh=c/{name}", b"damaged")
    with pytest.raises(StorageError, match="has 7 bytes, its manifest says"):
        AssetStore(f"{bucket}/runs").rows("source", ["c"])
    store.invalidate("source", "c")
    assert store.manifest("source", "c") is None
    store.make("losses", None, Recipe(lambda: Loss(base=2.5, student=2.25)), MADE_FROM)
    assert AssetStore(f"{bucket}/runs").value("losses", Loss) == Loss(base=2.5, student=2.25)
