"""Runs the pool's only actor in the process of the test, with the same decisions and store."""

from collections.abc import Callable

import pyarrow as pa
import pytest
import ray
from ray.data import Dataset

from operators.parquet_log import ParquetLog
from operators.select.score_store import Asked, Decide, Scorer, _decide, _judge, _prepare, _ScoringActor, _with_known


@pytest.fixture
def map_here(monkeypatch: pytest.MonkeyPatch, local_ray: None) -> Callable[..., Dataset]:
    """`map_with_scores` without a pool; `select_instructions` and `select_responses` use it too."""

    def map_with_scores(rows: Dataset, asked: Asked, decide: Decide, scorer: Scorer, kind: str) -> Dataset:
        folder = f"{scorer.folder}/{kind}"
        student, name = _judge(scorer, kind)
        known = _with_known(rows, ParquetLog(folder), name)
        prepared = _prepare(pa.concat_tables(ray.get(known.to_arrow_refs())), asked, student, scorer.config)
        scored = _ScoringActor(student, f"{folder}/{name}")(prepared)
        return ray.data.from_arrow(_decide(scored, decide, scorer.config))

    monkeypatch.setattr("operators.select.select.map_with_scores", map_with_scores)
    return map_with_scores
