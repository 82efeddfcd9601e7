"""Sentences that say what a run gained and why, and nothing that was not measured."""

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from operators.columns import ORIGINAL
from operators.evaluate.results import Evaluation, HeldOutLoss, Judgement
from operators.report.texts import signed

SURE = 0.9  # a change is reported if this share of the resamples has its sign
ENOUGH_ROWS = 10  # fewer rows say little about the spread
SIGNIFICANT = 0.05
NOT_SHOWN = (
    "One training cannot show how much of this is due to the rewrites and how much to tuning on any such rows. "
    "That would need a second training on the original rows with the same configuration."
)


class Conclusion(BaseModel):
    """Three sentences for the head of the report.

    Attributes:
        gained: what changed on the held-out rows, and how certain that is.
        by_what: what the student was trained on.
        not_shown: what these numbers cannot show.
        improved: whether the held-out loss fell, if resampling the rows shows it; None if nothing was measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gained: str
    by_what: str
    not_shown: str
    improved: bool | None


def conclude(
    evaluation: Evaluation | None,
    recycled: Mapping[str, int],
    num_steps: int | None,
    num_packed: int,
    num_general: int = 0,
) -> Conclusion:
    """Say what was gained, by what, and what is not shown.

    Args:
        evaluation: None if the student was not evaluated.
        recycled: rows by outcome, over all refreshes.
        num_steps: optimizer steps; None if the student was not trained.
        num_packed: recycled rows that the student was trained on.
        num_general: rows of general data that it was trained on too.
    """
    gained, improved = _gained(evaluation)
    return Conclusion(
        gained=gained,
        by_what=_by_what(recycled, num_steps, num_packed, num_general),
        not_shown=NOT_SHOWN if num_steps is not None and improved is not None else "",
        improved=improved,
    )


def _gained(evaluation: Evaluation | None) -> tuple[str, bool | None]:
    if evaluation is None:
        return "The student was not evaluated, so this run shows no gain.", None
    loss = evaluation.held_out_loss
    if loss.base is None or loss.student is None or loss.change.estimate is None:
        return "No held-out loss of both models was measured, so this run shows no gain.", None
    sentence, improved = _loss_sentence(loss)
    return f"{sentence} {_judge_sentence(evaluation.judge)}".strip(), improved


def _loss_sentence(loss: HeldOutLoss) -> tuple[str, bool | None]:
    change = loss.change
    low, high = change.at(0.05), change.at(0.95)
    measured = (
        f"On {loss.num_rows} held-out rows the loss went from {loss.base:.3f} to {loss.student:.3f} nats per token"
    )
    if loss.num_rows < ENOUGH_ROWS or low is None or high is None:
        return f"{measured}; fewer than {ENOUGH_ROWS} rows are too few to show whether this is more than chance.", None
    spread = f"in 90 % of the resampled row sets the change lies between {signed(low)} and {signed(high)}"
    if (change.at(SURE) or 0.0) < 0:
        return f"{measured}: tuning helped ({spread}).", True
    if (change.at(1 - SURE) or 0.0) > 0:
        return f"{measured}: the student got worse ({spread}).", False
    return f"{measured}: no gain is shown ({spread}).", False


def _judge_sentence(judge: Judgement | None) -> str:
    if judge is None:
        return ""
    return f"{_verdicts_sentence(judge)} {_unjudged_sentence(judge)}".strip()


def _unjudged_sentence(judge: Judgement) -> str:
    """How many pairs have no verdict, and why; "" if all have one."""
    if not judge.unparsed:
        return ""
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(judge.unparsed_reasons.items()))
    return f"{judge.unparsed} of {judge.num_pairs + judge.unparsed} pairs have no verdict (replies: {reasons})."


def _verdicts_sentence(judge: Judgement) -> str:
    if not judge.num_pairs:
        return ""
    counts = f"Judged against the base model's answers it won {judge.wins}, tied {judge.ties} and lost {judge.losses}"
    p = judge.sign_test_p
    if p is None or p > SIGNIFICANT:
        return f"{counts}, which equal models would also give often."
    return f"{counts} (sign test p = {p:.2g})."


def _by_what(recycled: Mapping[str, int], num_steps: int | None, num_packed: int, num_general: int) -> str:
    total = sum(recycled.values())
    rewritten = total - recycled.get(ORIGINAL, 0)
    rows = f"{rewritten} of {total} recycled rows have a rewrite in place of the original"
    if num_steps is None:
        return f"The student was not trained; {rows}."
    steps = "step" if num_steps == 1 else "steps"
    others = f" and {num_general} rows of general data" if num_general else ""
    return f"It was trained for {num_steps} {steps} on {num_packed} rows{others}; {rows}, and the others are unchanged."
