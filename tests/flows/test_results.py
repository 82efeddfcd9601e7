"""What the report is made from, on a storage that no flow has run on."""

import json
from pathlib import Path
from typing import Any

import pytest

from flows.config import load_config
from flows.recycle_and_train import GRAPH
from flows.results import results_of, unused_columns
from flows.run import Run, open_run
from operators.evaluate.results import Evaluation, Release

SMOKE = Path(__file__).resolve().parents[2] / "configs/smoke.yaml"
DECIDED = Release(released=False, version="v1", reasons=("worse",))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return open_run(load_config(SMOKE, [f"storage={tmp_path}"]), GRAPH.specs)


def finished(storage: Path, refresh: str, metrics: dict[str, Any]) -> None:
    folder = storage / "assets" / "raw_instructions" / f"refresh={refresh}"
    folder.mkdir(parents=True)
    manifest = {"asset": "raw_instructions", "refresh": refresh, "fingerprint": "x", "made_from": {"files": []}}
    manifest |= {"seconds": 1.0, "peak_memory_mib": 1, "metrics": metrics, "files": {}, "rows": 0, "outcomes": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "_SUCCESS").touch()


def test_unused_columns_are_summed_over_all_refreshes(run: Run, tmp_path: Path) -> None:
    assert unused_columns(run) == {}
    finished(tmp_path, "a", {"ignored_columns": {"context": 3, "system": 1}})
    finished(tmp_path, "b", {"ignored_columns": {"context": 2}})
    finished(tmp_path, "c", {})
    assert unused_columns(run) == {"context": 5, "system": 1}


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
