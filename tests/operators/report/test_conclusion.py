import pytest

from operators.evaluate.results import Evaluation, HeldOutLoss, Judgement, PairedChange
from operators.report.conclusion import NOT_SHOWN, conclude

RECYCLED = {"original": 10, "instruction": 2, "response": 6, "both": 4}


def an_evaluation(student: float, spread: float, num_rows: int = 12, judge: Judgement | None = None) -> Evaluation:
    change = student - 2.0
    quantiles = tuple(change + spread * (place - 50) / 50 for place in range(1, 100)) if num_rows > 1 else ()
    paired = PairedChange(num_rows=num_rows, estimate=change, quantiles=quantiles)
    return Evaluation(
        held_out_loss=HeldOutLoss(base=2.0, student=student, num_rows=num_rows, change=paired), judge=judge
    )


@pytest.mark.parametrize(
    ("student", "spread", "num_rows", "said", "improved"),
    [
        (1.8, 0.1, 12, "tuning helped (in 90 % of the resampled row sets the change lies between −0.290 and", True),
        (1.99, 0.1, 12, "no gain is shown", False),
        (2.01, 0.1, 12, "no gain is shown", False),
        (2.0, 0.0, 12, "no gain is shown", False),
        (2.2, 0.1, 12, "the student got worse", False),
        (1.0, 0.1, 1, "fewer than 10 rows are too few to show", None),
        (1.0, 0.1, 9, "fewer than 10 rows are too few to show", None),
    ],
)
def test_a_gain_is_claimed_only_where_resampling_the_rows_shows_it(
    student: float, spread: float, num_rows: int, said: str, improved: bool | None
) -> None:
    conclusion = conclude(an_evaluation(student, spread, num_rows), RECYCLED, 30, 22)
    assert said in conclusion.gained
    assert f"On {num_rows} held-out rows the loss went from 2.000 to {student:.3f}" in conclusion.gained
    assert conclusion.improved is improved
    assert (conclusion.not_shown == NOT_SHOWN) is (improved is not None)


def test_the_training_data_of_the_student_is_stated() -> None:
    conclusion = conclude(an_evaluation(1.8, 0.1), RECYCLED, 1, 20)
    assert conclusion.by_what == (
        "It was trained for 1 step on 20 rows; 12 of 22 recycled rows have a rewrite in place of the original, "
        "and the others are unchanged."
    )
    assert "for 1 step on 20 rows and 30 rows of general data; 12" in conclude(None, RECYCLED, 1, 20, 30).by_what


def test_nothing_is_claimed_where_nothing_was_measured() -> None:
    for evaluation in (None, Evaluation()):
        conclusion = conclude(evaluation, RECYCLED, None, 0)
        assert "so this run shows no gain" in conclusion.gained
        assert "The student was not trained" in conclusion.by_what
        assert (conclusion.not_shown, conclusion.improved) == ("", None)


@pytest.mark.parametrize(
    ("wins", "losses", "p", "said"),
    [
        (3, 1, 0.625, "won 3, tied 2 and lost 1, which equal models would also give often"),
        (20, 2, 0.0001, "won 20, tied 2 and lost 2 (sign test p = 0.0001)"),
    ],
)
def test_wins_that_may_be_chance_are_described_as_such(wins: int, losses: int, p: float, said: str) -> None:
    judge = Judgement(num_pairs=wins + losses + 2, wins=wins, ties=2, losses=losses, win_margin=0.1, sign_test_p=p)
    assert said in conclude(an_evaluation(1.8, 0.1, judge=judge), RECYCLED, 30, 22).gained


def test_pairs_without_a_verdict_are_counted_with_their_reasons() -> None:
    judge = Judgement(
        num_pairs=0, wins=0, ties=0, losses=0, unparsed=2, unparsed_reasons={"call_failed": 3, "cut_off": 1}
    )
    said = conclude(an_evaluation(1.8, 0.1, judge=judge), RECYCLED, 30, 22).gained
    assert said.endswith("2 of 2 pairs have no verdict (replies: call_failed 3, cut_off 1).")
    assert "Judged" not in said
