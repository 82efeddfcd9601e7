"""metrics.jsonl and TensorBoard's curves: one line per step, each step once, even after kills."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from operators import progress
from operators.train.metrics import METRICS, TENSORBOARD, StepMetrics, lines_of, metrics_file, read_metrics


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(progress, "report_progress", lambda *_, **__: None)


def step(number: int, loss: float = 2.0) -> StepMetrics:
    return StepMetrics(
        step=number,
        epoch=0,
        loss=loss,
        grad_norm=None,
        learning_rate=1e-5,
        tokens=1000,
        supervised_tokens=400,
        examples=3,
        neft_l2=2.89,
        seconds=2.0,
        pid=1,
        padded_tokens=1024,
        model_flops=1e12,
    )


def test_a_line_holds_the_rates_of_its_step(tmp_path: Path) -> None:
    with metrics_file(tmp_path, 0, began=0.0) as metrics:
        metrics.record(step(0), total_steps=2)
    [line] = read_metrics(tmp_path / METRICS)
    assert (line["tokens_per_second"], line["supervised_tokens_per_second"]) == (500, 200)
    assert (line["padded_tokens_per_second"], line["model_flops_per_second"]) == (512, 5e11)
    assert line["grad_norm"] is None
    assert 0 < line["goodput"] < 1e-6, "the run began in 1970"


def test_lost_steps_are_measured_again_and_appear_once(tmp_path: Path) -> None:
    with metrics_file(tmp_path, 0, began=0.0) as metrics:
        for number in range(4):
            metrics.record(step(number), total_steps=5)
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 4, "lo')  # as a killed worker leaves it
    with metrics_file(tmp_path, 2, began=0.0) as metrics:
        metrics.record(step(2, loss=1.5), total_steps=5)
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path / METRICS)] == [(0, 2), (1, 2), (2, 1.5)]
    curves = EventAccumulator(str(tmp_path / TENSORBOARD)).Reload()
    assert [(point.step, point.value) for point in curves.Scalars("train/loss")] == [(0, 2), (1, 2), (2, 1.5)]


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    with metrics_file(tmp_path, 0, began=0.0) as metrics:
        metrics.record(step(0), total_steps=1)
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_line_is_not_read() -> None:
    assert lines_of("") == []
    assert lines_of(json.dumps({"step": 0}) + "\n{") == [{"step": 0}]
