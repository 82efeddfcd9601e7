"""Counts over an asset's files do not depend on the order of rows or on how they are split into files."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from cluster.counts import count_rows, sum_of_ids


def written(folder: Path, *tables: pa.Table) -> list[str]:
    files = [str(folder / f"{number}.parquet") for number in range(len(tables))]
    for file, table in zip(files, tables, strict=True):
        pq.write_table(table, file)
    return files


def test_rows_are_counted_by_outcome_and_summed_by_id(tmp_path: Path) -> None:
    whole = pa.table({"row_id": ["a", "b", "c"], "outcome": ["", "dropped:x", ""], "text": ["1", "2", "3"]})
    (tmp_path / "cut").mkdir()
    found = [
        count_rows(fs.LocalFileSystem(), files)
        for files in (written(tmp_path, whole), written(tmp_path / "cut", whole.slice(2), whole.slice(0, 2)))
    ]
    assert found[0] == found[1]
    assert (found[0]["rows"], found[0]["outcomes"]) == (3, {"": 2, "dropped:x": 1})


def test_files_without_outcomes_have_only_a_number_of_rows(tmp_path: Path) -> None:
    assert count_rows(fs.LocalFileSystem(), written(tmp_path, pa.table({"x": [1, 2]}))) == {"rows": 2}
    without_ids = count_rows(fs.LocalFileSystem(), written(tmp_path, pa.table({"outcome": ["packed"]})))
    assert without_ids == {"rows": 1, "outcomes": {"packed": 1}}


def test_the_sum_of_ids_depends_on_every_row_and_not_on_their_order() -> None:
    ids = [hashlib.sha256(str(number).encode()).hexdigest()[:32] for number in range(1000)]
    known = sum_of_ids(pa.array(ids)).tolist()
    assert sum_of_ids(pa.array(ids[::-1])).tolist() == known
    assert (sum_of_ids(pa.array(ids[:400])) + sum_of_ids(pa.array(ids[400:]))).tolist() == known
    assert sum_of_ids(pa.array([*ids[1:], ids[1]])).tolist() != known
    assert not sum_of_ids(pa.array([], pa.string())).any()
