"""New files of an asset take the place of the old ones with their manifest, and not before."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from pyarrow import fs

from cluster import asset_files
from cluster.asset_files import swap_in, write_rows
from cluster.manifest import Manifest, read_manifest

FILES = fs.LocalFileSystem()


def put(folder: Path, aside: str, text: str, *, renames: bool = True) -> None:
    rows = ray.data.from_arrow(pa.table({"outcome": [text]}))
    held = write_rows(FILES, str(folder), aside, rows, lambda: pa.schema([]))
    swap_in(FILES, str(folder), aside, Manifest(fingerprint=text, **held), renames=renames)


def texts(folder: Path) -> list[str]:
    made = read_manifest(FILES, "asset", str(folder))
    return [text for path in made.paths(str(folder)) for text in pq.read_table(path)["outcome"].to_pylist()]


@pytest.mark.parametrize("renames", [True, False])
def test_the_new_files_replace_the_old_ones(tmp_path: Path, local_ray: None, renames: bool) -> None:
    put(tmp_path, "one", "old", renames=renames)
    put(tmp_path, "two", "new", renames=renames)
    assert texts(tmp_path) == ["new"]
    assert len([*tmp_path.rglob("*.parquet")]) == 1
    assert (tmp_path / "one").exists() is False
    assert (tmp_path / "two").exists() is not renames


def test_without_the_new_manifest_the_old_files_count(
    tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "aside", "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(asset_files, "write_file", fail)
    with pytest.raises(OSError, match="disk full"):
        put(tmp_path, "aside", "new")
    assert texts(tmp_path) == ["old"]


def test_no_rows_have_the_columns_that_are_asked_for(tmp_path: Path, local_ray: None) -> None:
    (tmp_path / "aside").mkdir()  # Ray removes a folder that it made for no rows
    empty = ray.data.from_items([{"outcome": ""}]).filter(lambda _: False)
    held = write_rows(FILES, str(tmp_path), "aside", empty, lambda: pa.schema([("outcome", pa.string())]))
    [name] = held["files"]
    assert (held["rows"], pq.read_table(tmp_path / name).column_names) == (0, ["outcome"])
