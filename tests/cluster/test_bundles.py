"""Many small refreshes in one file: nothing is lost, doubled or mixed up, wherever the move is cut off."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import ray
from pyarrow import fs

from cluster import bundles
from cluster.bundles import bundled, tidy
from cluster.files import StorageError
from cluster.storage import AssetStore, Recipe

ASSET = "rows"


def make(store: AssetStore, key: str, texts: list[str]) -> None:
    rows = [{"row_id": text, "outcome": "", "text": text} for text in texts]
    empty = ray.data.from_items([{"row_id": "", "outcome": "", "text": ""}]).limit(0)
    store.make(ASSET, key, Recipe(lambda: ray.data.from_items(rows) if rows else empty), {"made": texts})


def texts(store: AssetStore, *keys: str) -> list[str]:
    return sorted(row["text"] for row in store.rows(ASSET, keys or store.refreshes(ASSET)).take_all())


@pytest.fixture
def root(tmp_path: Path, local_ray: None) -> Path:
    store = AssetStore(str(tmp_path))
    for number in range(4):
        make(store, f"day-{number}", [f"{number}-{row}" for row in range(number)])  # the first has no row
    return tmp_path


ALL = ["1-0", "2-0", "2-1", "3-0", "3-1", "3-2"]


def bundle(root: Path, most_loose: int = 3) -> int:
    return tidy(fs.LocalFileSystem(), ASSET, f"{root}/assets/{ASSET}", most_loose)


def files(root: Path) -> list[str]:
    return sorted(path.suffix for path in root.rglob("*") if path.is_file())


def test_few_refreshes_stay_where_they_are_and_many_share_two_files(root: Path) -> None:
    assert bundle(root, most_loose=4) == 0
    before = AssetStore(str(root)).manifest(ASSET, "day-2")
    assert bundle(root) == 4
    assert files(root) == [".json", ".parquet"]
    store = AssetStore(str(root))
    after = store.manifest(ASSET, "day-2")
    assert before is not None
    assert after is not None
    where = {"files", "checksums", "groups"}
    assert after.model_dump(exclude=where) == before.model_dump(exclude=where)
    assert store.refreshes(ASSET) == [f"day-{number}" for number in range(4)]
    assert [texts(store, f"day-{number}") for number in range(3)] == [[], ["1-0"], ["2-0", "2-1"]]
    assert texts(store) == ALL
    assert bundle(root) == 0


def test_a_refresh_that_is_made_again_keeps_its_order_and_its_old_rows_leave_the_bundle(root: Path) -> None:
    bundle(root)
    store = AssetStore(str(root))
    make(store, "day-2", ["retracted but for this"])
    assert texts(store, "day-2") == ["retracted but for this"]
    assert store.refreshes(ASSET)[2] == "day-2"
    [old] = root.rglob("bundles/*.parquet")
    bundle(root)
    [rows] = root.rglob("bundles/*.parquet")
    assert rows != old
    assert texts(AssetStore(str(root)), "day-1", "day-3") == ["1-0", "3-0", "3-1", "3-2"]
    assert texts(AssetStore(str(root))) == ["1-0", "3-0", "3-1", "3-2", "retracted but for this"]
    assert not [row for row in open_rows(rows) if row.startswith("2-")]


def open_rows(path: Path) -> list[str]:
    import pyarrow.parquet as pq

    found: list[str] = pq.read_table(path)["text"].to_pylist()
    return found


def test_an_invalid_refresh_is_unfinished_and_keeps_its_order(root: Path) -> None:
    bundle(root)
    store = AssetStore(str(root))
    store.invalidate(ASSET, "day-1")
    for fresh in (store, AssetStore(str(root))):
        assert fresh.manifest(ASSET, "day-1") is None
        assert fresh.refreshes(ASSET) == ["day-0", "day-2", "day-3"]
    make(store, "day-1", ["again"])
    assert store.refreshes(ASSET) == [f"day-{number}" for number in range(4)]
    bundle(root)
    assert texts(AssetStore(str(root))) == ["2-0", "2-1", "3-0", "3-1", "3-2", "again"]


@pytest.mark.parametrize("step", ["write_file", "_delete_folder", "_write"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_move_that_is_cut_off_loses_and_doubles_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, step: str, after: int
) -> None:
    real, done = getattr(bundles, step), 0

    def cut_off(*arguments: Any) -> Any:
        nonlocal done
        done += 1
        if done > after:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(bundles, step, cut_off)
        with contextlib.suppress(KeyboardInterrupt):
            bundle(root)
    assert texts(AssetStore(str(root))) == ALL
    bundle(root, most_loose=0)
    assert texts(AssetStore(str(root))) == ALL
    assert files(root).count(".parquet") == len(list(root.rglob("bundles/*.json")))


def test_a_refresh_that_is_in_two_bundles_counts_once(root: Path) -> None:
    bundle(root)
    [record] = root.rglob("bundles/*.json")
    [rows] = root.rglob("bundles/*.parquet")
    record.with_name("0again.json").write_text(record.read_text().replace(record.stem, "0again"))
    record.with_name("0again.json").write_text(record.read_text())
    record.with_name("0again.parquet").write_bytes(rows.read_bytes())
    assert texts(AssetStore(str(root))) == ALL
    bundle(root)
    assert [path.name for path in root.rglob("bundles/*.json")] == [record.name]
    assert texts(AssetStore(str(root))) == ALL


def test_damage_is_named_with_its_cure_and_a_damaged_refresh_is_not_moved(root: Path) -> None:
    [rows] = root.rglob("refresh=day-1/*.parquet")
    sound = rows.read_bytes()
    rows.write_bytes(sound[:-30] + bytes([sound[-30] ^ 1]) + sound[-29:])
    assert bundle(root) == 3
    assert rows.exists()
    rows.write_bytes(sound)
    [shared] = root.rglob("bundles/*.parquet")
    content = shared.read_bytes()
    shared.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    with pytest.raises(StorageError, match=rf"{shared} is damaged.*{shared.stem}\.json and make again"):
        texts(AssetStore(str(root)))
    shared.write_bytes(content[:-9])
    assert bundle(root) == 0
    [record] = root.rglob("bundles/*.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"members": []}))
    with pytest.raises(StorageError, match="cannot be read; restore it"):
        bundled(fs.LocalFileSystem(), ASSET, f"{root}/assets/{ASSET}")


def test_in_a_bucket_refreshes_are_bundled_too(bucket: str, local_ray: None) -> None:
    store = AssetStore(bucket)
    for number in range(4):
        make(store, f"day-{number}", [f"{number}"])
    filesystem, inside = fs.FileSystem.from_uri(bucket)
    assert tidy(filesystem, ASSET, f"{inside}/assets/{ASSET}", 3) == 4
    again = AssetStore(bucket)
    assert texts(again) == ["0", "1", "2", "3"]
    make(again, "day-1", ["new"])
    tidy(filesystem, ASSET, f"{inside}/assets/{ASSET}", 3)
    assert texts(AssetStore(bucket)) == ["0", "2", "3", "new"]
