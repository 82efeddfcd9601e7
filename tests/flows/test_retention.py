"""Old students are deleted as configured, but never one that may be needed at once."""

from pathlib import Path

import pytest

from flows.retention import has_weights, prune_students
from operators.evaluate.release_history import Event, ReleaseHistory
from operators.evaluate.results import Evaluation, HeldOutLoss

STUDENTS: tuple[tuple[str, Event, float], ...] = (
    ("v1", "released", 1.5),  # the best
    ("v2", "released", 1.9),
    ("v3", "refused", 2.1),
    ("v4", "released", 1.8),  # before the released one
    ("v5", "refused", 2.2),
    ("v6", "released", 1.7),
    ("v7", "refused", 2.3),
)


@pytest.fixture
def storage(tmp_path: Path) -> str:
    history = ReleaseHistory(str(tmp_path))
    for version, event, loss in STUDENTS:
        history.record(event, version, Evaluation(held_out_loss=HeldOutLoss(base=2.0, student=loss)), ())
        given_to(tmp_path, version)
    given_to(tmp_path, "given-up")
    return str(tmp_path)


def given_to(storage: Path, version: str) -> None:
    folder = storage / "students" / version
    folder.mkdir(parents=True)
    for name in ("manifest.json", "model.safetensors"):
        (folder / name).write_text(version)


def left(storage: str) -> set[str]:
    return {folder.name for folder in (Path(storage) / "students").iterdir()}


@pytest.mark.parametrize(
    ("keep", "deleted"), [(0, []), (1, ["given-up", "v2", "v3"]), (2, ["given-up", "v2"]), (3, ["given-up"]), (9, [])]
)
def test_the_oldest_go_first_and_the_best_and_the_released_stay(storage: str, keep: int, deleted: list[str]) -> None:
    before = left(storage)
    assert prune_students(storage, keep, "v7") == deleted
    assert left(storage) == before - set(deleted)
    assert {"v1", "v4", "v6", "v7"} <= left(storage)
    assert len(ReleaseHistory(storage).decisions()) == len(STUDENTS), "the history stays"


def test_a_student_that_was_rolled_back_to_stays(storage: str) -> None:
    ReleaseHistory(storage).roll_back("v2")
    assert prune_students(storage, 1, "v7") == ["given-up", "v3", "v4"]
    assert has_weights(storage, "v2")


def test_a_storage_without_students_has_nothing_to_delete(tmp_path: Path) -> None:
    assert prune_students(str(tmp_path), 1, "v1") == []


def test_in_a_bucket_too(bucket: str) -> None:
    from operators.files.atomic import put_file

    history = ReleaseHistory(f"{bucket}/runs")
    for version, event, loss in STUDENTS[:4]:
        history.record(event, version, Evaluation(held_out_loss=HeldOutLoss(base=2.0, student=loss)), ())
        put_file(f"{bucket}/runs/students/{version}/manifest.json", version)
    assert prune_students(f"{bucket}/runs", 1, "v4") == []
    put_file(f"{bucket}/runs/students/given-up/config.json", "{}")
    assert prune_students(f"{bucket}/runs", 1, "v4") == ["given-up"]
    assert not has_weights(f"{bucket}/runs", "given-up")
    assert has_weights(f"{bucket}/runs", "v3")
