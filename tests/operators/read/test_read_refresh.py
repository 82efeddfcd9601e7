"""A refresh from its files, its archive and the refreshes before it: every record once, with its outcome."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from operators.columns import RAW
from operators.read.config import ReadConfig
from operators.read.drop_near_duplicates import DeduplicateConfig
from operators.read.read_refresh import read_refresh

pytestmark = pytest.mark.usefixtures("local_ray")


def record(number: int) -> dict[str, str]:
    return {"instruction": f"Name the capital of country {number}.", "output": f"It is city {number}."}


def read(folder: Path, name: str, numbers: list[int], earlier: pa.Table | None = None, **options: object) -> pa.Table:
    file = folder / name
    file.write_text("".join(json.dumps(record(number)) + "\n" for number in numbers))
    before = None if earlier is None else ray.data.from_arrow(earlier)
    config = ReadConfig(path=str(folder))
    rows = read_refresh([str(file)], before, config, DeduplicateConfig(near=False), frozenset(), **options)
    return pa.concat_tables(ray.get(rows.to_arrow_refs())).cast(RAW)


def outcomes(rows: pa.Table) -> Counter[str]:
    return Counter(rows["outcome"].to_pylist())


def test_rows_of_earlier_refreshes_are_dropped_and_counted(tmp_path: Path) -> None:
    first = read(tmp_path, "a.jsonl", [1, 2, 3])
    assert outcomes(first) == {"": 3}
    second = read(tmp_path, "b.jsonl", [3, 4], first)
    assert outcomes(second) == {"": 1, "dropped:seen_in_earlier_refresh": 1}


def test_archived_rows_stand_in_for_a_file_that_is_gone(tmp_path: Path) -> None:
    archived = ray.data.from_arrow(read(tmp_path, "gone.jsonl", [1, 2]))
    rows = read(tmp_path, "a.jsonl", [2, 3], archived=archived)
    assert sorted(rows["instruction"].to_pylist()) == [record(number)["instruction"] for number in (1, 2, 3)]
