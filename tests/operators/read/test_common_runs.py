"""Runs of words that many rows share are counted exactly, and in a bounded sample of very many rows."""

import numpy as np
import pyarrow as pa
import pytest
import ray

from operators.columns import HELD_OUT, RAW, conform
from operators.ngrams import run_hashes
from operators.read import common_runs
from operators.read.common_runs import MOST_ROWS, CommonRuns, is_sampled, rows_with


def source(*texts: str, outcome: str = "") -> "ray.data.Dataset":
    names = [f"{outcome}{number}" for number in range(len(texts))]
    table = pa.table({"row_id": names, "instruction": texts, "outcome": [outcome] * len(texts)})
    return ray.data.from_arrow(conform(table, RAW))


def texts_of(rows: pa.Table) -> list[str]:
    return rows["instruction"].to_pylist()  # type: ignore[no-any-return]


def counted(*sources: "ray.data.Dataset", num_rows: int = 9, common_rows: int = 2) -> CommonRuns:
    found: CommonRuns = ray.get(common_runs.common_runs([*sources], num_rows, texts_of, 2, common_rows))
    return found


def rows_of(found: CommonRuns, *runs: str) -> list[int]:
    return [int(rows_with(run_hashes(run, 2), found)[0]) for run in runs]


@pytest.mark.usefixtures("local_ray")
class TestCommonRuns:
    def test_a_run_counts_once_per_row_over_all_sources(self) -> None:
        one, other = source("so it is so it is", "so it goes"), source("so it was", "as it was", outcome=HELD_OUT)
        assert rows_of(counted(one, other), "so it", "it was", "it goes") == [3, 0, 0]
        assert rows_of(counted(one, other, common_rows=1), "so it", "it was", "it goes") == [3, 2, 0]

    def test_rows_that_are_left_out_do_not_count(self) -> None:
        copies = source(*["so it is"] * 9, outcome="dropped:duplicate")
        assert not len(counted(source("so it is"), copies).hashes)

    def test_parts_and_a_sample_give_the_same_counts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = source(*(f"so it is word{number}" for number in range(400)))
        monkeypatch.setattr(common_runs, "PER_PARTITION", 400 * common_runs.RUNS_PER_ROW // 2)
        found = counted(rows, num_rows=400)
        assert len(found.hashes) == 2
        assert (np.diff(found.hashes.astype(object)) > 0).all()
        assert rows_of(found, "so it", "is word3") == [MOST_ROWS, 0]
        monkeypatch.setattr(common_runs, "SAMPLED_ROWS", 100)
        sampled = counted(rows, num_rows=400)
        assert (sampled.hashes == found.hashes).all()
        assert 60 < sampled.rows[0] < 140


def test_the_id_of_a_row_decides_whether_it_is_counted() -> None:
    names = [f"row{number}" for number in range(2_000)]
    some = [name for name in names if is_sampled(name, 0.1)]
    assert 120 < len(some) < 280
    assert set(some) < {name for name in names if is_sampled(name, 0.2)}
    assert all(is_sampled(name, 1) for name in names)
