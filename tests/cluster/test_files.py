"""Parquet files are read completely, however many there are."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from cluster import files
from cluster.files import MANY, Part, open_rows


@pytest.mark.usefixtures("local_ray")
def test_many_small_files_have_the_same_rows_as_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "GROUP_BYTES", 10_000)  # three tasks read these files
    schema = pa.schema([("row_id", pa.string()), ("text", pa.string())])
    for number in range(MANY + 8):
        ids = [f"{number}-{row}" for row in range(number % 3)]  # some files are empty
        pq.write_table(pa.table({"row_id": ids, "text": ["x"] * len(ids)}, schema), tmp_path / f"{number:03d}.parquet")
    paths = sorted(str(path) for path in tmp_path.glob("*.parquet"))
    rows = open_rows(fs.LocalFileSystem(), [Part(path) for path in paths])
    few = open_rows(fs.LocalFileSystem(), [Part(path) for path in paths[:MANY]])
    assert rows.columns() == few.columns() == schema.names
    expected = [f"{number}-{row}" for number in range(MANY + 8) for row in range(number % 3)]
    assert sorted(row["row_id"] for row in rows.select_columns(["row_id"]).take_all()) == sorted(expected)
    assert few.count() == sum(number % 3 for number in range(MANY))
