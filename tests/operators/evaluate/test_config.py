from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from operators.evaluate.config import EvaluateConfig, HarnessConfig
from operators.train.config import TrainConfig
from tests.operators.evaluate.task_folder import write_tasks


@pytest.mark.parametrize(
    ("named", "gpus", "precision", "longest"),
    [
        ({}, 1.0, "bf16", 32768),
        ({"gpus_per_actor": 0}, 0, "bf16", 32768),
        ({"max_tokens": 1024, "precision": "fp32"}, 1.0, "fp32", 1024),
        ({"gpus_per_actor": 0.5, "max_tokens": 64}, 0.5, "bf16", 64),
    ],
)
def test_evaluation_follows_the_student_unless_the_configuration_says_otherwise(
    named: dict[str, Any], gpus: float, precision: str, longest: int
) -> None:
    train = TrainConfig(num_workers=8, gpus_per_worker=1, precision="bf16")
    followed = EvaluateConfig.model_validate(named).following(train, 32768, "all")
    assert (followed.gpus_per_actor, followed.precision, followed.max_tokens) == (gpus, precision, longest)
    assert followed.loss_on == "all"


def test_short_packs_do_not_shorten_what_is_scored() -> None:
    assert EvaluateConfig().following(TrainConfig(), 512, "last").max_tokens == 2048


@pytest.mark.parametrize(
    ("named", "trained", "actors"),
    [
        ({}, {"num_workers": 8, "gpus_per_worker": 1}, 8),
        ({}, {"num_workers": 8, "gpus_per_worker": 1, "min_workers": 4}, 4),
        ({}, {"gpus_per_worker": 0.5}, 1),
        ({"gpus_per_actor": 4}, {"num_workers": 8, "gpus_per_worker": 1}, 2),
        ({"gpus_per_actor": 0.5}, {"num_workers": 8, "gpus_per_worker": 1}, 8),
        ({"gpus_per_actor": 0}, {"num_workers": 8, "gpus_per_worker": 1}, 1),
        ({"actors": 3}, {"num_workers": 8, "gpus_per_worker": 1}, 3),
        ({}, {"num_workers": 8}, 1),
    ],
)
def test_there_are_as_many_actors_as_the_gpus_of_the_training_allow(
    named: dict[str, Any], trained: dict[str, Any], actors: int
) -> None:
    train = TrainConfig.model_validate(trained)
    assert EvaluateConfig.model_validate(named).following(train, 512, "last").actors == actors


@pytest.mark.parametrize(
    ("trained", "threads"),
    [({}, 1), ({"threads_per_worker": 4}, 4), ({"cpus_per_worker": 6}, 6), ({"cpus_per_worker": 0.5}, 1)],
)
def test_an_actor_has_the_threads_of_a_worker(trained: dict[str, Any], threads: int) -> None:
    train = TrainConfig.model_validate(trained)
    followed = EvaluateConfig().following(train, 512, "last")
    assert (followed.threads, followed.cpus_per_actor) == (threads, train.cpus_per_worker)
    assert EvaluateConfig(threads=2).following(train, 512, "last").threads == 2


def test_without_tasks_an_evaluation_has_the_identity_of_earlier_releases() -> None:
    assert "harness" not in EvaluateConfig().identity()
    named = EvaluateConfig(harness=HarnessConfig(tasks=("arc_easy",)))
    assert named.identity()["harness"]["tasks"] == ["arc_easy"]
    faster = EvaluateConfig(harness=HarnessConfig(tasks=("arc_easy",), batch_rows=2, download=True))
    assert faster.identity() == named.identity()


def test_tasks_become_stale_with_their_files_and_not_with_their_place(tmp_path: Path) -> None:
    one, other = (
        HarnessConfig(tasks=("capitals",), include_path=write_tasks(tmp_path / name)) for name in ("one", "other")
    )
    assert one.identity() == other.identity()
    (tmp_path / "other" / "answers.py").write_text("# changed")
    assert one.identity() != other.identity()


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ({"limit": 5}, "limit have no effect without tasks"),
        ({"tasks": ["/tmp/task.yaml"]}, "is not the name of a task"),
        ({"tasks": ["task.yaml"]}, "is not the name of a task"),
    ],
)
def test_keys_of_tasks_that_cannot_be_meant_are_refused(named: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        HarnessConfig.model_validate(named)
