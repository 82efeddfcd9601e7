from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from operators.evaluate.release import ReleaseConfig, release
from operators.evaluate.release_history import ReleaseHistory
from operators.evaluate.results import (
    BEST,
    RELEASED,
    Comparison,
    Evaluation,
    HeldOutLoss,
    Judgement,
    PairedChange,
    Verdicts,
)
from operators.evaluate.rows import ROWS, write_rows

CONFIG = ReleaseConfig()


def a_change(estimate: float, spread: float = 0.01, num_rows: int = 40) -> PairedChange:
    """Quantiles spaced evenly around the estimate."""
    return PairedChange(
        num_rows=num_rows,
        estimate=estimate,
        quantiles=tuple(estimate + spread * (place - 50) / 50 for place in range(1, 100)),
    )


def a_judgement(wins: int = 5, ties: int = 2, losses: int = 3, **more: Any) -> Judgement:
    pairs = wins + ties + losses
    margin = (wins - losses) / pairs if pairs else None
    return Judgement(num_pairs=pairs, wins=wins, ties=ties, losses=losses, win_margin=margin, **more)


def an_evaluation(base: Any = 2.0, student: Any = 1.9, judge: Judgement | None = None, **more: Any) -> Evaluation:
    finite = base is not None and student is not None
    change = more.pop("change", a_change(student - base) if finite else PairedChange(num_rows=40))
    rows = more.pop("num_rows", 40)
    loss = HeldOutLoss(base=base, student=student, num_tokens=100, num_rows=rows, change=change)
    return Evaluation(held_out_loss=loss, judge=judge or a_judgement(), **more)


def against(version: str, role: str, change: PairedChange, judge: Verdicts | None = None) -> Comparison:
    return Comparison(version=version, role=role, change=change, judge=judge)


@pytest.fixture
def history(tmp_path: Path) -> ReleaseHistory:
    return ReleaseHistory(str(tmp_path / "storage"))


def test_the_first_student_that_is_not_worse_than_its_base_is_released(history: ReleaseHistory) -> None:
    answer = release(an_evaluation(), "v1", history, CONFIG)
    assert (answer.released, answer.version, answer.previous) == (True, "v1", None)
    current = history.current()
    assert current is not None
    assert current.version == "v1"
    assert [(decision.event, decision.version) for decision in history.decisions()] == [("released", "v1")]


@pytest.mark.parametrize(
    ("evaluation", "reason"),
    [
        (an_evaluation(student=2.1), "held-out loss +0.1000 nats per token against the base model on 40 rows"),
        (an_evaluation(student=None), "there is none to compare"),
        (an_evaluation(base=None), "there is none to compare"),
        (an_evaluation(judge=a_judgement(2, 2, 3)), "misses release.min_win_margin"),
        (an_evaluation(judge=a_judgement(0, 0, 0, unparsed=7)), "none of 7 verdicts"),
        (an_evaluation(num_rows=9), "9 scored held-out rows: too few (release.min_rows=10)"),
        (an_evaluation(change=a_change(-0.001, spread=0.1)), "at release.min_confidence=0.9: worse"),
    ],
)
def test_a_worse_or_doubtful_student_is_not_released_and_the_reason_is_given(
    history: ReleaseHistory, evaluation: Evaluation, reason: str
) -> None:
    answer = release(evaluation, "v1", history, CONFIG)
    assert not answer.released
    assert reason in " ".join(answer.reasons)
    assert history.current() is None
    assert [decision.event for decision in history.decisions()] == ["refused"]


def test_confidence_is_asked_for_as_configured(history: ReleaseHistory) -> None:
    doubtful = an_evaluation(change=a_change(-0.001, spread=0.1))
    assert release(doubtful, "v1", history, ReleaseConfig(min_confidence=0.5)).released


def test_equal_is_not_worse_and_margins_are_configurable(tmp_path: Path) -> None:
    def decide(name: str, evaluation: Evaluation, **margins: float) -> bool:
        config = ReleaseConfig(**{"min_confidence": 0.5, **margins})  # type: ignore[arg-type]
        return release(evaluation, "v1", ReleaseHistory(str(tmp_path / name)), config).released

    even = an_evaluation(student=2.0, judge=a_judgement(3, 2, 3))
    assert decide("a", even)
    worse = an_evaluation(student=2.04, judge=a_judgement(2, 2, 3))
    assert decide("b", worse, max_loss_increase=0.05, min_win_margin=-0.2)
    assert not decide("c", even, max_loss_increase=-0.01)


def test_without_a_judge_the_loss_decides(history: ReleaseHistory) -> None:
    answer = release(an_evaluation().model_copy(update={"judge": None}), "v1", history, CONFIG)
    assert answer.released
    assert "answers were not judged" in answer.reasons


def test_the_next_student_must_be_as_good_as_the_released_one_on_their_common_rows(history: ReleaseHistory) -> None:
    release(an_evaluation(), "v1", history, CONFIG)
    worse = an_evaluation(student=1.5, rivals=(against("v1", RELEASED, a_change(0.02)),))
    refused = release(worse, "v2", history, CONFIG)
    assert (refused.released, refused.previous) == (False, "v1")
    assert "+0.0200 nats per token against released v1 on 40 rows" in " ".join(refused.reasons)
    better = an_evaluation(rivals=(against("v1", RELEASED, a_change(-0.02)),))
    accepted = release(better, "v3", history, CONFIG)
    assert (accepted.released, accepted.previous) == (True, "v1")


def test_few_common_rows_are_not_enough(history: ReleaseHistory) -> None:
    release(an_evaluation(), "v1", history, CONFIG)
    few = an_evaluation(rivals=(against("v1", RELEASED, a_change(-0.02, num_rows=3)),))
    answer = release(few, "v2", history, CONFIG)
    assert not answer.released
    assert "3 scored held-out rows, those that released v1 has too: too few" in " ".join(answer.reasons)


def test_losing_against_the_released_students_answers_is_a_reason_too(history: ReleaseHistory) -> None:
    release(an_evaluation(), "v1", history, CONFIG)
    lost = against("v1", RELEASED, a_change(-0.02), a_judgement(1, 1, 8))
    answer = release(an_evaluation(rivals=(lost,)), "v2", history, CONFIG)
    assert not answer.released
    assert "1 wins, 1 ties, 8 losses against released v1" in " ".join(answer.reasons)


def test_many_small_steps_down_are_bounded_by_the_best_student_so_far(history: ReleaseHistory) -> None:
    lenient = ReleaseConfig(max_loss_increase=0.015, min_confidence=0.5)
    assert release(an_evaluation(student=1.9), "v1", history, lenient).released
    released = []
    for step in range(1, 5):
        rivals = (
            against(f"v{step}", RELEASED, a_change(0.009)),
            against("v1", BEST, a_change(0.009 * step)),
        )
        answer = release(an_evaluation(student=1.9 + 0.009 * step, rivals=rivals), f"v{step + 1}", history, lenient)
        released.append(answer.released)
        if not answer.released:
            assert "the best so far: beyond release.max_drift=0.02" in " ".join(answer.reasons)
            break
    assert released == [True, True, False]


@pytest.mark.parametrize("left", ["no comparison", "no common row", "few common rows", "another student's"])
def test_drift_is_bounded_also_if_the_best_students_rows_are_gone(history: ReleaseHistory, left: str) -> None:
    lenient = ReleaseConfig(max_loss_increase=0.03, min_confidence=0.5)
    assert release(an_evaluation(student=1.9), "v1", history, lenient).released
    released = 0
    for step in range(1, 11):
        rivals = [against(f"v{step}", RELEASED, a_change(0.019))]
        change = {"no common row": PairedChange(), "few common rows": a_change(-1, num_rows=2)}.get(left)
        rivals += [against("v1", BEST, change)] if change else []
        rivals += [against("v0", BEST, a_change(-1))] if left == "another student's" else []
        evaluation = an_evaluation(student=1.9 + 0.019 * step, rivals=tuple(rivals))
        answer = release(evaluation, f"v{step + 1}", history, lenient)
        if not answer.released:
            break
        released += 1
    assert released == 1, "0.019 is within max_drift, twice that is not"
    assert "against v1, the best so far, as recorded: beyond release.max_drift=0.02" in " ".join(answer.reasons)


def test_a_best_student_without_a_recorded_loss_cannot_be_compared(history: ReleaseHistory, tmp_path: Path) -> None:
    history.record("released", "v0", Evaluation(held_out_loss=HeldOutLoss()), ())
    (tmp_path / "storage" / "released.json").unlink()
    history.record("released", "v1", an_evaluation(base=2.0, student=2.1), ())
    answer = release(an_evaluation(rivals=(against("v1", RELEASED, a_change(-0.02)),)), "v2", history, CONFIG)
    assert not answer.released
    assert "against v0, the best so far: it cannot be compared" in " ".join(answer.reasons)


def test_a_decision_records_the_version_of_the_held_out_set(history: ReleaseHistory, tmp_path: Path) -> None:
    for number, ids in enumerate((["b", "a"], ["a", "b"], ["a", "b", "c"])):
        columns = {field.name: pa.array([None] * len(ids), field.type) for field in ROWS} | {"row_id": ids}
        write_rows(pa.table(columns, schema=ROWS), f"{tmp_path}/{number}.parquet")
        release(an_evaluation(rows=f"{tmp_path}/{number}.parquet"), f"v{number}", history, CONFIG)
    first, same, grown = [decision.held_out for decision in history.decisions()]
    assert first == same != grown
    assert len(grown) == 16
    history.record("released", "v9", an_evaluation(), ())
    assert history.roll_back("v0").held_out == first


def test_without_common_rows_the_recorded_distance_from_the_base_model_counts(history: ReleaseHistory) -> None:
    release(an_evaluation(base=2.0, student=1.8), "v1", history, CONFIG)
    assert not release(an_evaluation(base=2.5, student=2.31), "v2", history, CONFIG).released
    assert release(an_evaluation(base=2.5, student=2.29), "v3", history, CONFIG).released


def test_releasing_the_same_version_again_changes_nothing(history: ReleaseHistory) -> None:
    release(an_evaluation(student=1.9), "v1", history, CONFIG)
    release(an_evaluation(student=1.8), "v2", history, CONFIG)
    before = history.decisions()
    answer = release(an_evaluation(student=5.0), "v2", history, CONFIG)
    assert (answer.released, answer.previous) == (True, "v1")
    assert history.decisions() == before


def test_a_version_that_was_rolled_back_does_not_come_back_by_itself(history: ReleaseHistory) -> None:
    release(an_evaluation(student=1.9), "v1", history, CONFIG)
    release(an_evaluation(student=1.8), "v2", history, CONFIG)
    history.roll_back("v1")
    answer = release(an_evaluation(student=1.8), "v2", history, CONFIG)
    assert not answer.released
    assert "a person rolled v2 back" in " ".join(answer.reasons)
    current = history.current()
    assert current is not None
    assert current.version == "v1"


def test_an_equal_loss_is_exactly_equal_where_only_records_are_left(tmp_path: Path) -> None:
    for number in range(1, 60):
        history = ReleaseHistory(str(tmp_path / str(number)))
        same = an_evaluation(base=9.7, student=1.1 + number / 7)
        release(same, "v1", history, CONFIG)
        assert release(same, "v2", history, CONFIG).released, number
