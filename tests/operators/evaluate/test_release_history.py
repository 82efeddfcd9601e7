import json
import threading
from pathlib import Path

import pytest

from operators.evaluate.release_history import ReleaseHistory
from operators.evaluate.results import Evaluation, HeldOutLoss
from operators.files.atomic import put_file


def an_evaluation(student: float = 1.9) -> Evaluation:
    return Evaluation(held_out_loss=HeldOutLoss(base=2.0, student=student, num_tokens=10, num_rows=2))


def test_every_decision_is_a_file_of_its_own_and_none_changes(tmp_path: Path) -> None:
    history = ReleaseHistory(str(tmp_path))
    history.record("released", "v1", an_evaluation(), ("better",))
    first = (tmp_path / "releases" / "000001.json").read_bytes()
    history.record("refused", "v2", an_evaluation(2.5), ("worse",))
    history.record("released", "v3", an_evaluation(1.8), ("better",))
    assert sorted(path.name for path in (tmp_path / "releases").iterdir()) == [
        "000001.json",
        "000002.json",
        "000003.json",
    ]
    assert (tmp_path / "releases" / "000001.json").read_bytes() == first
    decisions = history.decisions()
    assert [(one.number, one.event, one.version, one.previous) for one in decisions] == [
        (1, "released", "v1", None),
        (2, "refused", "v2", "v1"),
        (3, "released", "v3", "v1"),
    ]
    assert decisions[1].held_out_loss.student == 2.5
    assert json.loads((tmp_path / "released.json").read_text())["version"] == "v3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["released.json", "releases"], (
        "nothing unfinished is left"
    )


def test_a_rollback_names_an_earlier_released_version_only(tmp_path: Path) -> None:
    history = ReleaseHistory(str(tmp_path))
    with pytest.raises(ValueError, match="rollback: v1 was never released; released were: none"):
        history.roll_back("v1")
    history.record("released", "v1", an_evaluation(), ())
    history.record("refused", "v2", an_evaluation(), ())
    history.record("released", "v3", an_evaluation(1.8), ())
    with pytest.raises(ValueError, match="rollback: v2 was never released; released were: v1, v3"):
        history.roll_back("v2")
    with pytest.raises(ValueError, match="v3 is the released student already"):
        history.roll_back("v3")
    decision = history.roll_back("v1")
    assert (decision.event, decision.version, decision.previous) == ("rolled_back", "v1", "v3")
    current = history.current()
    assert current is not None
    assert (current.version, current.previous, current.held_out_loss.student) == ("v1", "v3", 1.9)
    assert history.is_rolled_back("v3")
    assert not history.is_rolled_back("v1")
    history.roll_back("v3")
    assert not history.is_rolled_back("v3"), "a person may change their mind"


def test_the_best_student_is_the_one_farthest_below_its_base_and_not_one_that_was_taken_back(tmp_path: Path) -> None:
    history = ReleaseHistory(str(tmp_path))
    assert history.best() is None
    history.record("released", "v1", an_evaluation(1.9), ())
    history.record("released", "v2", an_evaluation(1.7), ())
    history.record("refused", "v3", an_evaluation(1.5), ())
    best = history.best()
    assert best is not None
    assert best.version == "v2"
    history.roll_back("v1")
    best = history.best()
    assert best is not None
    assert best.version == "v1"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"version": "v1"}',
        '{"version": 1, "held_out_loss": {}}',
        '{"version": "v", "held_out_loss": {}}',
    ],
)
def test_a_broken_pointer_is_an_error_not_a_fresh_start(tmp_path: Path, content: str) -> None:
    pointer = tmp_path / "released.json"
    pointer.write_text(content)
    with pytest.raises(ValueError, match=r"release: .*released.json holds no release record"):
        ReleaseHistory(str(tmp_path)).current()
    assert pointer.read_text() == content


def test_a_pointer_of_an_earlier_version_of_this_program_is_read(tmp_path: Path) -> None:
    loss = {"base": 2.0, "student": 1.9, "num_tokens": 10, "num_rows": 2, "unscored": {}}
    record = {"version": "v1", "previous": None, "released_at": "x", "held_out_loss": loss, "win_margin": None}
    (tmp_path / "released.json").write_text(json.dumps(record))
    current = ReleaseHistory(str(tmp_path)).current()
    assert current is not None
    assert current.version == "v1"


def test_a_decision_finds_its_rows_after_the_storage_was_moved(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    rows = old / "evaluations" / "v1.parquet"
    evaluation = an_evaluation().model_copy(update={"rows": str(rows)})
    ReleaseHistory(str(old)).record("released", "v1", evaluation, ())
    put_file(str(rows), "rows")
    old.rename(new)
    history = ReleaseHistory(str(new))
    [decision] = history.decisions()
    assert decision.rows == "evaluations/v1.parquet"
    assert history.rows_of(decision) == f"{new}/evaluations/v1.parquet"
    before = decision.model_copy(update={"rows": str(rows)})  # as older versions recorded it
    assert history.rows_of(before) == f"{new}/evaluations/v1.parquet"
    elsewhere = decision.model_copy(update={"rows": "/elsewhere/v1.parquet"})
    (new / "evaluations" / "v1.parquet").unlink()
    assert history.rows_of(elsewhere) == "/elsewhere/v1.parquet"


@pytest.mark.parametrize("name", ["released.json", "releases/000001.json"])
def test_a_flipped_bit_is_found_and_a_file_without_a_checksum_is_read(tmp_path: Path, name: str) -> None:
    history, file = ReleaseHistory(str(tmp_path)), tmp_path / name
    history.record("released", "v1", an_evaluation(), ())
    written = file.read_text()
    file.write_text(written.replace("1.9", "1.8"))
    with pytest.raises(ValueError, match=rf"{name} holds no release record"):
        (history.current(), history.decisions())
    unsealed = {key: value for key, value in json.loads(written).items() if key != "seal"}
    file.write_text(json.dumps(unsealed))
    current, [decision] = history.current(), history.decisions()
    assert current is not None
    assert current.version == decision.version == "v1"


def test_a_pointer_that_is_gone_is_the_last_decision_that_moved_it(tmp_path: Path) -> None:
    history = ReleaseHistory(str(tmp_path))
    history.record("refused", "v0", an_evaluation(), ())
    assert history.current() is None
    history.record("released", "v1", an_evaluation(), ())
    history.record("released", "v2", an_evaluation(), ())
    history.record("refused", "v3", an_evaluation(), ())
    before = history.current()
    (tmp_path / "released.json").unlink()
    assert history.current() == before
    assert before is not None
    assert (before.version, before.previous) == ("v2", "v1")


def test_a_storage_may_be_a_uri(tmp_path: Path) -> None:
    history = ReleaseHistory(f"file://{tmp_path}")
    assert history.current() is None
    history.record("released", "v1", an_evaluation(), ())
    current = history.current()
    assert current is not None
    assert current.version == "v1"


def test_a_reader_never_sees_half_a_pointer(tmp_path: Path) -> None:
    history = ReleaseHistory(str(tmp_path))
    history.record("released", "v0", an_evaluation(), ())
    done = threading.Event()
    broken: list[str] = []

    def read_until_done() -> None:
        while not done.is_set():
            try:
                ReleaseHistory(str(tmp_path)).current()
            except ValueError as error:
                broken.append(str(error))

    reader = threading.Thread(target=read_until_done)
    reader.start()
    for number in range(1, 60):
        history.record("released", f"v{number}", an_evaluation(), ())
    done.set()
    reader.join()
    assert broken == []
