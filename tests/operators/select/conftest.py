"""Runs the pool's only actor in the process of the test, with the same decisions and store."""

import hashlib
from collections.abc import Callable

import pyarrow as pa
import pytest
import ray
from ray.data import Dataset

from operators.models import model_revision
from operators.parquet_log import ParquetLog
from operators.select.ifd import StudentScorer
from operators.select.score_store import Asked, Decide, Scorer, _decide, _prepare, _ScoringActor, _with_known


@pytest.fixture
def map_here(monkeypatch: pytest.MonkeyPatch, local_ray: None) -> Callable[..., Dataset]:
    """`map_with_scores` without a pool; `select_instructions` and `select_responses` use it too."""

    def map_with_scores(rows: Dataset, asked: Asked, decide: Decide, scorer: Scorer, kind: str) -> Dataset:
        folder = f"{scorer.folder}/{kind}"
        name = hashlib.sha256(model_revision(scorer.student).encode()).hexdigest()[:16]
        known = _with_known(rows, ParquetLog(folder), name)
        student = StudentScorer(scorer.student, scorer.config)
        prepared = _prepare(pa.concat_tables(ray.get(known.to_arrow_refs())), asked, student, scorer.config)
        scored = _ScoringActor(student, f"{folder}/{name}")(prepared)
        return ray.data.from_arrow(_decide(scored, decide, scorer.config))

    monkeypatch.setattr("operators.select.select.map_with_scores", map_with_scores)
    return map_with_scores
