"""Old students are deleted as configured, but never one that may be needed at once."""

from pathlib import Path

import pytest

from flows.retention import has_weights, prune_students
from operators.evaluate.release_history import Event, ReleaseHistory
from operators.evaluate.results import Evaluation, HeldOutLoss

GIVEN_UP, V1, V2, V3, V4, V5, V6, V7 = (f"{number:016x}" for number in range(8))
STUDENTS: tuple[tuple[str, Event, float], ...] = (
    (V1, "released", 1.5),  # the best
    (V2, "released", 1.9),
    (V3, "refused", 2.1),
    (V4, "released", 1.8),  # before the released one
    (V5, "refused", 2.2),
    (V6, "released", 1.7),
    (V7, "refused", 2.3),
)
MODEL = ("manifest.json", "config.json", "model.safetensors")


@pytest.fixture
def storage(tmp_path: Path) -> str:
    history = ReleaseHistory(str(tmp_path))
    for version, event, loss in STUDENTS:
        history.record(event, version, Evaluation(held_out_loss=HeldOutLoss(base=2.0, student=loss)), ())
        given_to(tmp_path, version)
    (tmp_path / "students" / GIVEN_UP / "checkpoints").mkdir(parents=True)
    return str(tmp_path)


def given_to(storage: Path, version: str) -> None:
    folder = storage / "students" / version
    folder.mkdir(parents=True)
    for name in MODEL:
        (folder / name).write_text(version)


def left(storage: str) -> set[str]:
    return {folder.name for folder in (Path(storage) / "students").iterdir()}


@pytest.mark.parametrize(
    ("keep", "deleted"), [(0, []), (1, [GIVEN_UP, V2, V3]), (2, [GIVEN_UP, V2]), (3, [GIVEN_UP]), (9, [])]
)
def test_the_oldest_go_first_and_the_best_and_the_released_stay(storage: str, keep: int, deleted: list[str]) -> None:
    before = left(storage)
    assert prune_students(storage, keep, V7) == deleted
    assert left(storage) == before - set(deleted)
    assert {V1, V4, V6, V7} <= left(storage)
    assert len(ReleaseHistory(storage).decisions()) == len(STUDENTS), "the history stays"


def test_a_student_that_was_rolled_back_to_stays(storage: str) -> None:
    ReleaseHistory(storage).roll_back(V2)
    assert prune_students(storage, 1, V7) == [GIVEN_UP, V3, V4]
    assert has_weights(storage, V2)


@pytest.mark.parametrize("name", ["my-best-student", f"{V2}-copy", "f" * 16])
def test_a_folder_that_no_training_made_stays(storage: str, name: str) -> None:
    copy = Path(storage) / "students" / name
    copy.mkdir()
    (copy / "model.safetensors").write_text("years")
    assert name not in prune_students(storage, 1, V7)
    assert (copy / "model.safetensors").exists()


@pytest.mark.parametrize("gone", MODEL)
def test_a_student_that_is_only_partly_there_has_no_weights(storage: str, gone: str) -> None:
    assert has_weights(storage, V2)
    (Path(storage) / "students" / V2 / gone).unlink()
    assert not has_weights(storage, V2)


def test_a_storage_without_students_has_nothing_to_delete(tmp_path: Path) -> None:
    assert prune_students(str(tmp_path), 1, V1) == []


def test_in_a_bucket_too(bucket: str) -> None:
    from operators.files.atomic import put_file

    history = ReleaseHistory(f"{bucket}/runs")
    for version, event, loss in STUDENTS[:4]:
        history.record(event, version, Evaluation(held_out_loss=HeldOutLoss(base=2.0, student=loss)), ())
        for name in MODEL:
            put_file(f"{bucket}/runs/students/{version}/{name}", version)
    assert prune_students(f"{bucket}/runs", 1, V4) == []
    put_file(f"{bucket}/runs/students/{GIVEN_UP}/checkpoints/began.json", "{}")
    assert prune_students(f"{bucket}/runs", 1, V4) == [GIVEN_UP]
    assert not has_weights(f"{bucket}/runs", GIVEN_UP)
    assert has_weights(f"{bucket}/runs", V3)
