import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest

from operators.evaluate.release import ReleaseConfig, read_release, release

CONFIG = ReleaseConfig()


def an_evaluation(base: Any = 2.0, student: Any = 1.9, wins: int = 5, losses: int = 3) -> dict[str, Any]:
    pairs = wins + losses + 2
    judge = {"num_pairs": pairs, "wins": wins, "ties": 2, "losses": losses, "unparsed": 0}
    loss = {"base": base, "student": student, "num_tokens": 100, "num_rows": 4, "unscored": {}}
    return {"held_out_loss": loss, "judge": judge | {"win_margin": (wins - losses) / pairs}, "samples": []}


def test_the_first_student_that_is_not_worse_than_its_base_is_released(tmp_path: Path) -> None:
    pointer = str(tmp_path / "sub" / "released.json")
    answer = release(an_evaluation(), "v1", pointer, CONFIG)
    assert (answer["released"], answer["version"], answer["previous"]) == (True, "v1", None)
    assert json.loads(Path(pointer).read_text())["version"] == "v1"
    assert [path.name for path in Path(pointer).parent.iterdir()] == ["released.json"], "nothing unfinished is left"


@pytest.mark.parametrize(
    ("evaluation", "reason"),
    [
        (an_evaluation(student=2.1), "held-out loss 2.1000 against 2.0000"),
        (an_evaluation(student=None), "there is none to compare"),
        (an_evaluation(student=math.nan), "there is none to compare"),
        (an_evaluation(base=None), "there is none to compare"),
        (an_evaluation(wins=2, losses=3), "misses release.min_win_margin"),
        (an_evaluation() | {"judge": {"num_pairs": 0, "unparsed": 7, "win_margin": None}}, "none of 7 verdicts"),
    ],
)
def test_a_worse_student_is_not_released_and_the_reason_is_given(
    tmp_path: Path, evaluation: dict[str, Any], reason: str
) -> None:
    pointer = tmp_path / "released.json"
    answer = release(evaluation, "v1", str(pointer), CONFIG)
    assert not answer["released"]
    assert reason in " ".join(answer["reasons"])
    assert not pointer.exists()


def test_equal_is_not_worse_and_margins_are_configurable(tmp_path: Path) -> None:
    even = an_evaluation(student=2.0, wins=3, losses=3)
    assert release(even, "v1", str(tmp_path / "a"), CONFIG)["released"]
    worse = an_evaluation(student=2.04, wins=2, losses=3)
    lenient = ReleaseConfig(max_loss_increase=0.05, min_win_margin=-0.2)
    assert release(worse, "v1", str(tmp_path / "b"), lenient)["released"]
    assert not release(even, "v1", str(tmp_path / "c"), ReleaseConfig(max_loss_increase=-0.01))["released"]


def test_without_a_judge_the_loss_decides(tmp_path: Path) -> None:
    answer = release(an_evaluation() | {"judge": None}, "v1", str(tmp_path / "r"), CONFIG)
    assert answer["released"]
    assert "answers were not judged" in answer["reasons"]


def test_the_next_student_must_be_as_good_as_the_released_one_not_only_as_the_base(tmp_path: Path) -> None:
    pointer = str(tmp_path / "released.json")
    release(an_evaluation(student=1.8), "v1", pointer, CONFIG)
    refused = release(an_evaluation(student=1.9), "v2", pointer, CONFIG)
    assert (refused["released"], refused["previous"]) == (False, "v1")
    assert read_release(pointer)["version"] == "v1"  # type: ignore[index]
    accepted = release(an_evaluation(student=1.7), "v3", pointer, CONFIG)
    assert (accepted["released"], accepted["previous"]) == (True, "v1")


def test_a_harder_held_out_set_is_allowed_for_by_the_base_models_loss_on_it(tmp_path: Path) -> None:
    pointer = str(tmp_path / "released.json")
    release(an_evaluation(base=2.0, student=1.8), "v1", pointer, CONFIG)
    assert not release(an_evaluation(base=2.5, student=2.31), "v2", pointer, CONFIG)["released"]
    assert release(an_evaluation(base=2.5, student=2.29), "v3", pointer, CONFIG)["released"]


def test_releasing_the_same_version_again_changes_nothing(tmp_path: Path) -> None:
    pointer = tmp_path / "released.json"
    release(an_evaluation(student=1.9), "v1", str(pointer), CONFIG)
    release(an_evaluation(student=1.8), "v2", str(pointer), CONFIG)
    before = pointer.read_bytes()
    answer = release(an_evaluation(student=5.0), "v2", str(pointer), CONFIG)
    assert (answer["released"], answer["previous"]) == (True, "v1")
    assert pointer.read_bytes() == before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "v1"}', '{"version": 1, "held_out_loss": {}}'])
def test_a_broken_pointer_is_an_error_not_a_fresh_start(tmp_path: Path, content: str) -> None:
    pointer = tmp_path / "released.json"
    pointer.write_text(content)
    with pytest.raises(ValueError, match=r"release: .*released.json holds no release record"):
        release(an_evaluation(), "v1", str(pointer), CONFIG)
    assert pointer.read_text() == content


def test_a_pyarrow_uri_is_a_pointer_too(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/released.json"
    assert read_release(uri) is None
    assert release(an_evaluation(), "v1", uri, CONFIG)["released"]
    assert read_release(uri)["version"] == "v1"  # type: ignore[index]


def test_a_reader_never_sees_half_a_pointer(tmp_path: Path) -> None:
    pointer = str(tmp_path / "released.json")
    release(an_evaluation(student=1.9), "v0", pointer, CONFIG)
    done = threading.Event()
    broken: list[str] = []

    def read_until_done() -> None:
        while not done.is_set():
            try:
                read_release(pointer)
            except ValueError as error:
                broken.append(str(error))

    reader = threading.Thread(target=read_until_done)
    reader.start()
    for number in range(1, 100):
        assert release(an_evaluation(student=1.9 - number / 1000), f"v{number}", pointer, CONFIG)["released"]
    done.set()
    reader.join()
    assert broken == []


def test_an_equal_loss_on_the_same_rows_is_exactly_equal(tmp_path: Path) -> None:
    pointer = str(tmp_path / "released.json")
    for number in range(1, 60):
        loss = 1.1 + number / 7
        Path(pointer).unlink(missing_ok=True)
        release(an_evaluation(base=9.7, student=loss), "v1", pointer, CONFIG)
        assert release(an_evaluation(base=9.7, student=loss), "v2", pointer, CONFIG)["released"], loss
