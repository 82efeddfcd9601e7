"""Tasks of the real lm-evaluation-harness from a local folder, where the package is installed."""

from pathlib import Path

import pytest

from operators.evaluate import harness
from operators.evaluate.config import EvaluateConfig, HarnessConfig, TrainedAttention
from operators.evaluate.harness import examine_harness, measure_tasks, side_by_side
from operators.evaluate.results import TaskFailure
from tests.operators.evaluate.task_folder import write_tasks


def test_a_missing_package_and_a_missing_folder_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = HarnessConfig(tasks=("capitals",), include_path=str(tmp_path / "gone"))
    monkeypatch.setattr(harness, "package_folder", lambda: None)
    [finding] = examine_harness(config)
    assert (finding.key, finding.fatal) == ("evaluate.harness.tasks", True)
    assert "pip install lm_eval" in finding.text
    monkeypatch.setattr(harness, "package_folder", lambda: tmp_path)
    [finding] = examine_harness(config)
    assert finding.key == "evaluate.harness.include_path"
    assert examine_harness(HarnessConfig()) == []


def test_scores_of_the_models_are_put_side_by_side_and_failures_are_kept() -> None:
    one = {"task": "capitals", "metric": "acc", "higher_is_better": True, "score": 0.5, "error": 0.1}
    found = side_by_side(
        {
            "base": [one, {"task": "broken", "reason": "RuntimeError: x"}],
            "student": [one | {"score": 1.0, "error": None}],
        }
    )
    [score] = found.scores
    assert (score.task, score.scores, score.errors) == ("capitals", {"base": 0.5, "student": 1.0}, {"base": 0.1})
    assert found.failed == (TaskFailure(role="base", task="broken", reason="RuntimeError: x"),)


@pytest.mark.slow
def test_the_doctor_names_unknown_tasks_foreign_code_and_data_that_is_not_here(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder = write_tasks(tmp_path / "tasks")
    config = HarnessConfig(tasks=("capitals", "arc_easy", "no_such_task", "humaneval"), include_path=folder)
    unknown, network = None, None
    for finding in examine_harness(config):
        assert finding.fatal
        unknown = finding.text if finding.text.startswith("no_such_task: no such task") else unknown
        network = finding.text if finding.text.startswith("arc_easy: cannot be loaded") else network
        assert not finding.text.startswith("capitals"), finding.text
    assert unknown
    assert network
    assert "evaluate.harness.download: true" in network
    (Path(folder) / "x.yaml").write_text("task: x\nprocess_docs: !function os.system\n")
    [finding] = examine_harness(config)
    assert finding.key == "evaluate.harness.include_path"
    assert "os.system" in finding.text


@pytest.mark.slow
def test_a_real_task_of_a_folder_is_measured_once_and_a_failing_one_is_counted(
    tiny_model: str, local_ray: None, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    tasks = HarnessConfig(tasks=("broken", "capitals"), include_path=write_tasks(tmp_path / "tasks"))
    config = EvaluateConfig(harness=tasks, cpus_per_actor=0.5)
    models = {"base": (tiny_model, TrainedAttention()), "student": (str(tmp_path / "gone"), TrainedAttention())}
    first = measure_tasks({"base": models["base"]}, config, str(tmp_path / "kept"))
    assert first is not None
    [score] = first.scores
    assert (score.task, score.metric, score.higher_is_better) == ("capitals", "acc", True)
    assert score.scores["base"] in (0, 0.25, 0.5, 0.75, 1)
    assert [(one.role, one.task) for one in first.failed] == [("base", "broken")]
    assert "no such answer" in first.failed[0].reason
    [kept] = (tmp_path / "kept").glob("*.json")
    kept.write_text(kept.read_text().replace(f'"score": {score.scores["base"]}', '"score": 7.0'))
    again = measure_tasks(models, config, str(tmp_path / "kept"))
    assert again is not None
    assert [one.scores for one in again.scores] == [{"base": 7.0}], "the second time it is not asked"
    assert [(one.role, one.task) for one in again.failed] == [
        ("base", "broken"),
        ("student", "broken"),
        ("student", "capitals"),
    ]
