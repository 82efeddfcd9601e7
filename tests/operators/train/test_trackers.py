"""Trackers offline, where they are installed; what is said where they are not."""

import importlib.util
from pathlib import Path

import pytest
import torch.distributed as dist

from operators import progress
from operators.train.metrics import metrics_file
from operators.train.trackers import missing_trackers, open_trackers
from tests.operators.train.test_metrics import step


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(progress, "report_progress", lambda *_, **__: None)


def test_mlflow_goes_on_with_its_run_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    for begin in (0, 2):
        with metrics_file(tmp_path, begin, began=0.0, trackers=["mlflow"]) as metrics:
            for number in (begin, begin + 1):
                metrics.record(step(number, loss=2.0 - number / 4), total_steps=4)
    [run] = mlflow.search_runs(output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(0, 2.0), (1, 1.75), (2, 1.5), (3, 1.25)]


@pytest.mark.slow
def test_wandb_writes_offline_into_the_students_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with metrics_file(tmp_path, 0, began=0.0, trackers=["wandb"]) as metrics:
        metrics.record(step(0, loss=1.625), total_steps=1)
    [file] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"train/loss" in content
    assert b"1.625" in content


def test_a_missing_tracker_is_named_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlflow" else True)
    assert missing_trackers(["wandb"]) == ""
    with pytest.raises(ValueError, match=r"train.trackers: mlflow not installed; `pip install mlflow-skinny`"):
        open_trackers(["wandb", "mlflow"], tmp_path)
