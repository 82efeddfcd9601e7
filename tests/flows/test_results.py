"""The inputs of the report, on a storage on which no flow has run."""

import json
from pathlib import Path
from typing import Any

import pytest

from flows.config import load_config
from flows.recycle_and_train import GRAPH
from flows.results import results_of, stage_summaries, unused_columns
from flows.run import Run, open_run
from operators.evaluate.results import Evaluation, Release

SMOKE = Path(__file__).resolve().parents[2] / "configs/smoke.yaml"
DECIDED = Release(released=False, version="v1", reasons=("worse",))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return open_run(load_config(SMOKE, [f"storage={tmp_path}"]), GRAPH.specs)


def finished(
    storage: Path, refresh: str, metrics: dict[str, Any], asset: str = "raw_instructions", rows: int = 0
) -> None:
    folder = storage / "assets" / asset / f"refresh={refresh}"
    folder.mkdir(parents=True)
    manifest = {"asset": asset, "refresh": refresh, "fingerprint": "x", "made_from": {"files": []}}
    manifest |= {"seconds": 1.0, "peak_memory_mib": 1, "metrics": metrics, "files": {}, "rows": rows, "outcomes": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "_SUCCESS").touch()


def test_unused_columns_are_summed_over_all_refreshes(run: Run, tmp_path: Path) -> None:
    assert unused_columns(run) == {}
    finished(tmp_path, "a", {"ignored_columns": {"context": 3, "system": 1}})
    finished(tmp_path, "b", {"ignored_columns": {"context": 2}})
    finished(tmp_path, "c", {})
    assert unused_columns(run) == {"context": 5, "system": 1}


def test_a_stage_reads_the_rows_of_the_assets_before_it(run: Run, tmp_path: Path) -> None:
    for refresh, rows in (("a", 5), ("b", 3)):
        for asset in ("raw_instructions", "held_out", "instruction_reflections", "recycled_instructions"):
            finished(tmp_path, refresh, {}, asset, 1 if asset == "held_out" else rows)
    found = {stage.asset: (stage.rows_in, stage.rows_out) for stage in stage_summaries(run)}
    assert found == {
        "raw_instructions": (None, 8),
        "held_out": (8, 2),
        "instruction_reflections": (8, 8),
        "recycled_instructions": (None, 8),
    }


@pytest.mark.parametrize(("content", "known"), [(None, False), ("no JSON", False), ('{"styles": []}', True)])
def test_the_report_that_is_replaced_is_read_if_it_can_be(
    run: Run, tmp_path: Path, content: str | None, known: bool
) -> None:
    if content is not None:
        (tmp_path / "reports").mkdir()
        (tmp_path / "reports" / "smoke.json").write_text(content)
    results = results_of(run, {}, Evaluation(), DECIDED)
    assert (results.earlier is not None) is known
    assert results.release == DECIDED
    assert (results.costs, results.decisions, results.stages) == ([], [], [])
