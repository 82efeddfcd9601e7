"""A training starts from the base model or from the released student of the same base model, decided once."""

from pathlib import Path

import pytest

from flows.config import load_config
from flows.recycle_and_train import GRAPH
from flows.run import Run, open_run
from flows.training_start import starting_student
from operators.evaluate.release_history import ReleaseHistory
from operators.evaluate.results import Evaluation, HeldOutLoss
from tests.flows.flow_runs import SMOKE


def run_of(folder: Path, model: str, *overrides: str) -> Run:
    settings = [f"storage={folder}/storage", f"source.path={folder}/source", f"student.model={model}", *overrides]
    return open_run(load_config(Path(SMOKE), settings), GRAPH.specs)


def released(run: Run, version: str) -> str:
    """Add a released student that started as configured."""
    folder = run.path("students", version)
    starting_student(run, folder)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in ("manifest.json", "config.json", "model.safetensors"):
        (Path(folder) / name).write_text("{}")
    loss = HeldOutLoss(base=2.0, student=1.9)
    ReleaseHistory(run.config.storage).record("released", version, Evaluation(held_out_loss=loss), ())
    return folder


def test_the_base_model_is_the_start_unless_the_released_student_is_asked_for(tmp_path: Path, tiny_model: str) -> None:
    run = run_of(tmp_path, tiny_model, "train.start=released")
    first = released(run, "v1")
    assert starting_student(run, run.path("students", "v2")) == first
    plain = run_of(tmp_path, tiny_model)
    assert starting_student(plain, plain.path("students", "v3")) == tiny_model
    assert not Path(plain.path("students", "v3")).exists()


def test_a_training_keeps_its_start_whatever_is_released_meanwhile(tmp_path: Path, tiny_model: str) -> None:
    run = run_of(tmp_path, tiny_model, "train.start=released")
    first = released(run, "v1")
    second = run.path("students", "v2")
    assert starting_student(run, second) == first
    released(run, "v9")
    assert starting_student(run, second) == first
    assert starting_student(run, run.path("students", "v3")) == run.path("students", "v9")


def test_a_student_of_another_base_model_is_not_the_start(tmp_path: Path, tiny_model: str, demo_model: str) -> None:
    released(run_of(tmp_path, tiny_model, "train.start=released"), "v1")
    run = run_of(tmp_path, demo_model, "train.start=released")
    assert starting_student(run, run.path("students", "v2")) == demo_model


def test_a_student_whose_weights_were_deleted_is_not_the_start(tmp_path: Path, tiny_model: str) -> None:
    import shutil

    run = run_of(tmp_path, tiny_model, "train.start=released")
    shutil.rmtree(released(run, "v1"))
    assert starting_student(run, run.path("students", "v2")) == tiny_model


def test_a_student_saved_as_adapters_cannot_be_the_start(tmp_path: Path, tiny_model: str) -> None:
    from flows.config import ConfigError

    with pytest.raises(ConfigError, match=r"start: released with lora.merge: false"):
        run_of(tmp_path, tiny_model, "train.start=released", "train.lora.r=4", "train.lora.merge=false")
