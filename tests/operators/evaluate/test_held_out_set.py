"""The version of a held-out set depends on its rows and on nothing else."""

from pathlib import Path

import pyarrow as pa

from operators.evaluate.held_out_set import version_of
from operators.evaluate.rows import ROWS, write_rows


def version(tmp_path: Path, ids: list[str], nll: float) -> str:
    columns = {field.name: pa.array([None] * len(ids), field.type) for field in ROWS}
    columns |= {"row_id": pa.array(ids), "student_nll": pa.array([nll] * len(ids))}
    write_rows(pa.table(columns, schema=ROWS), f"{tmp_path}/rows.parquet")
    return version_of(f"{tmp_path}/rows.parquet")


def test_the_same_rows_are_the_same_version_whatever_was_measured(tmp_path: Path) -> None:
    assert version(tmp_path, ["a", "b"], 1.0) == version(tmp_path, ["b", "a"], 2.0)
    assert version(tmp_path, ["a", "b"], 1.0) != version(tmp_path, ["a", "c"], 1.0)


def test_without_a_file_there_is_no_version(tmp_path: Path) -> None:
    assert version_of("") == version_of(f"{tmp_path}/gone.parquet") == ""
