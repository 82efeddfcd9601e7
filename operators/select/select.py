"""The student's choice between the original and the teacher's rewrite.

Selective Reflection-Tuning (arXiv 2402.10110, section 3) in its sequential form: first the instruction of higher IFD,
then the response of lower r-IFD. A rewrite must win a comparison to replace the original: if its score is missing, not
finite or not below 1, if the original has no score, or if both scores are equal, the original stays. The authors' code
drops the whole row in these cases.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
from ray.data import Dataset

from operators.columns import (
    ACTIVE,
    BOTH,
    INSTRUCTION,
    INSTRUCTION_REFLECTED,
    ORIGINAL,
    PARSED,
    RECYCLED,
    RESPONSE,
    RESPONSE_REFLECTED,
    SELECTED,
)
from operators.progress import report_progress
from operators.select.config import HIGHER_IS_BETTER, RATIOS, Measure, SelectConfig
from operators.select.ifd import Pair, Score, Turn, ifd_turn, reverse_ifd_turn
from operators.select.judge import Judge, Judgements, judged
from operators.select.score_store import REWARDS, Scorer, Scores, map_with_scores
from operators.stage import require_columns

Values = dict[str, Any]

NOT_REFLECTED = "dropped:response_not_reflected"


def select_instructions(rows: Dataset, config: SelectConfig, scorer: Scorer, judge: Judge | None = None) -> Dataset:
    """Choose between each original pair and the better instruction with its own new answer.

    The input stays with either instruction. Rows with an outcome pass through with nulls.

    Args:
        rows: see below.
        config: the policy.
        scorer: the student, before training.
        judge: decides under policy judge.

    Columns in:
        columns.INSTRUCTION_REFLECTED.
    Columns out:
        columns.SELECTED. `ifd_original` is computed for every active row, also if there is nothing to choose. Both
        scores are null under policy none; they are perplexities, rewards or verdicts under the policies of these names.
    Source:
        arXiv 2402.10110, section 3: argmax of IFD, from the student before training.
    """
    require_columns("select_instructions", INSTRUCTION_REFLECTED.names, rows.columns() or [])
    return _map(rows, instruction_choice(config), scorer, judge)


def select_responses(rows: Dataset, config: SelectConfig, scorer: Scorer, judge: Judge | None = None) -> Dataset:
    """Choose between the selected response and the teacher's better one, and say how each row ends.

    Args: those of `select_instructions`.

    Columns in:
        columns.RESPONSE_REFLECTED.
    Columns out:
        columns.RECYCLED. `outcome` becomes original, instruction (the reflected pair was selected first), response
        (the better response was chosen), both, or dropped:response_not_reflected if the configuration says so.
        Scores are null under policies none and ifd; they are perplexities, rewards or verdicts under the policies of
        these names.
    Source:
        arXiv 2402.10110, section 3: argmin of r-IFD, from the student before training. The second condition, an IFD of
        the final pair below 1 (`ifd_better_response`), is in the authors' code and not in the text.
    """
    require_columns("select_responses", RESPONSE_REFLECTED.names, rows.columns() or [])
    return _map(rows, response_choice(config), scorer, judge)


def instruction_choice(config: SelectConfig) -> "Choice":
    """The choice of instructions, as configured."""
    names = ("original", "better_instruction")
    measure = config.first_measure()
    return Choice("select_instructions", measure, "ifd", names, SELECTED, _instructions, chosen_instruction)


def response_choice(config: SelectConfig) -> "Choice":
    """The choice of responses, as configured."""
    names = ("selected", "better_response")
    measure = config.second_measure()
    decide = partial(chosen_response, keep_unreflected=config.keep_unreflected_responses)
    also_ifd = config.require_final_ifd and measure == "rifd"
    return Choice("select_responses", measure, "rifd", names, RECYCLED, _responses, decide, also_ifd)


def new_is_better(measure: Measure | None, old: float | None, new: float | None) -> bool:
    """Whether the new candidate replaces the old one.

    Args:
        measure: ifd, reward, judge: higher is better; rifd, perplexity: lower; None: the new one is always taken.
        old: score of the old candidate; if it is None or not finite, nothing replaces the old one.
        new: score of the candidate; eligible if finite and, for ratios, below 1.
    """
    if measure is None:
        return True
    if old is None or new is None or not (math.isfinite(old) and math.isfinite(new)):
        return False
    if measure in RATIOS and new >= 1:
        return False
    return new > old if measure in HIGHER_IS_BETTER else new < old


def is_learnable(ifd: float | None) -> bool:
    """Whether the instruction makes the answer more likely: an IFD that is finite and below 1."""
    return ifd is not None and math.isfinite(ifd) and ifd < 1


def better_instruction_pair(row: Values) -> tuple[str, str] | None:
    """The reflected instruction with its own answer; None unless both were parsed: it must not get the old answer."""
    pair = row["better_instruction"], row["better_instruction_response"]
    usable = row["instruction_reflection"] in PARSED and all(text and text.strip() for text in pair)
    return pair if usable else None


def better_response(row: Values) -> str | None:
    """The reflected response; None unless it was parsed and is not empty."""
    text: str | None = row["better_response"]
    return text if row["response_reflection"] in PARSED and text and text.strip() else None


def chosen_instruction(row: Values, measure: Measure | None, old: float | None, new: float | None) -> Values:
    """The columns `selected_*` of an active row."""
    better = better_instruction_pair(row)
    taken = better if better and new_is_better(measure, old, new) else (row["instruction"], row["response"])
    return {"selected_instruction": taken[0], "selected_response": taken[1]}


def chosen_response(
    row: Values, measure: Measure | None, old: float | None, new: float | None, *, keep_unreflected: bool
) -> Values:
    """The columns `final_*` and the outcome of an active row; a dropped row has no final pair."""
    better = better_response(row)
    taken = better is not None and new_is_better(measure, old, new)
    if not taken and not keep_unreflected:
        return {"final_instruction": None, "final_response": None, "outcome": NOT_REFLECTED}
    instruction_taken = _selected_reflection(row)
    outcome = (BOTH if instruction_taken else RESPONSE) if taken else (INSTRUCTION if instruction_taken else ORIGINAL)
    response = better if taken else row["selected_response"]
    return {"final_instruction": row["selected_instruction"], "final_response": response, "outcome": outcome}


def _selected_reflection(row: Values) -> bool:
    selected = row["selected_instruction"], row["selected_response"]
    return selected != (row["instruction"], row["response"]) and selected == better_instruction_pair(row)


@dataclass(frozen=True)
class Choice:
    """One of the two selections: the score that it compares, and the columns that it reads and writes."""

    stage: str
    measure: Measure | None
    prefix: str  # of the score columns
    names: tuple[str, str]  # of the two candidates, in score columns and reasons
    schema_out: pa.Schema
    candidates: Callable[[Values], tuple[Pair, Pair | None]]  # of an active row: the old pair, its replacement
    decide: Callable[[Values, Measure | None, float | None, float | None], Values]
    also_ifd: bool = False  # the replacement must also have an IFD below 1


def _instructions(row: Values) -> tuple[Pair, Pair | None]:
    better = better_instruction_pair(row)
    old = Pair(row["instruction"], row["input"], row["response"], row.get("turns_before") or "")
    return old, replace(old, instruction=better[0], response=better[1]) if better else None


def _responses(row: Values) -> tuple[Pair, Pair | None]:
    better = better_response(row)
    old = Pair(row["selected_instruction"], row["input"], row["selected_response"], row.get("turns_before") or "")
    return old, replace(old, response=better) if better else None


def _map(rows: Dataset, choice: Choice, scorer: Scorer, judge: Judge | None) -> Dataset:
    if choice.measure is None:
        return rows.map_batches(partial(_select_unscored, choice=choice), batch_format="pyarrow", num_cpus=0.5)
    if choice.measure == "judge":
        if judge is None:
            raise ValueError(f"{choice.stage}: policy judge needs a judge; give one")
        scored = judged(rows, choice.candidates, judge)
        return scored.map_batches(partial(_select_judged, choice=choice), batch_format="pyarrow", num_cpus=0.5)
    # Perplexities come from the same likelihoods as IFD and share its folder; r-IFD scores other texts.
    kind = "rifd" if choice.measure == "rifd" else REWARDS if choice.measure == "reward" else "ifd"
    return map_with_scores(rows, partial(asked_turns, choice=choice), partial(select_rows, choice=choice), scorer, kind)


def _select_unscored(rows: pa.Table, choice: Choice) -> pa.Table:
    return select_rows(rows, None, choice)


def _select_judged(rows: pa.Table, choice: Choice) -> pa.Table:
    return select_rows(rows, Judgements(rows, choice.candidates), choice)


def asked_turns(row: Values, choice: Choice) -> list[Turn]:
    """The turns to score for one row: those of both pairs and, for `also_ifd`, the IFD turn of the second pair."""
    if row["outcome"] != ACTIVE:
        return []
    pairs = [pair for pair in choice.candidates(row) if pair]
    turns = [_turn_of(choice.measure)(pair) for pair in pairs]
    return turns + [ifd_turn(pair) for pair in pairs[1:] if choice.also_ifd]


def select_rows(rows: pa.Table, scores: Scores | Judgements | None, choice: Choice) -> pa.Table:
    """Choose for every active row of one batch; without scores nothing is compared."""
    records = rows.to_pylist()
    active = [row for row in records if row["outcome"] == ACTIVE]
    pairs = [choice.candidates(row) for row in active]
    finals = _final_ifd(scores, active, pairs) if choice.also_ifd else [None] * len(active)
    for row, (old, new), final in zip(active, _scores(scores, choice.measure, active, pairs), finals, strict=True):
        old_value, new_value = (_value(score, choice.measure) for score in (old, new))
        row |= {
            f"{choice.prefix}_{name}": value for name, value in zip(choice.names, (old_value, new_value), strict=True)
        }
        row |= {f"{choice.prefix}_unscored": _reasons(choice.names, (old, new))}
        if choice.also_ifd:
            row["ifd_better_response"] = _value(final, "ifd")
            new_value = new_value if is_learnable(row["ifd_better_response"]) else None
        row |= choice.decide(row, choice.measure, old_value, new_value)
    report_progress(choice.stage, rows=rows.num_rows)
    return pa.Table.from_pylist(records, schema=choice.schema_out)


def _scores(
    scores: Scores | Judgements | None,
    measure: Measure | None,
    rows: Sequence[Values],
    pairs: Sequence[tuple[Pair, Pair | None]],
) -> list[tuple[Score | None, Score | None]]:
    """The student's scores of both pairs of each row; None if there is no pair or no measure."""
    if scores is None:
        return [(None, None)] * len(pairs)
    turns = [
        (row["row_id"], _turn_of(measure)(pair)) for row, both in zip(rows, pairs, strict=True) for pair in both if pair
    ]
    found = iter(scores.of(turns))
    return [(next(found), next(found) if new else None) for _, new in pairs]


def _turn_of(measure: Measure | None) -> Callable[[Pair], Turn]:
    return reverse_ifd_turn if measure == "rifd" else ifd_turn


def _final_ifd(
    scores: Scores | Judgements | None, rows: Sequence[Values], pairs: Sequence[tuple[Pair, Pair | None]]
) -> list[Score | None]:
    """The student's IFD scores of the answers that may replace others."""
    if scores is None:
        return [None] * len(pairs)
    found = iter(scores.of([(row["row_id"], ifd_turn(new)) for row, (_, new) in zip(rows, pairs, strict=True) if new]))
    return [next(found) if new else None for _, new in pairs]


def _value(score: Score | None, measure: Measure | None) -> float | None:
    if score is None:
        return None
    if measure in ("reward", "judge"):
        return score.reward
    return score.perplexity if measure == "perplexity" else score.ratio


def _reasons(names: tuple[str, str], scores: tuple[Score | None, Score | None]) -> str | None:
    found = [f"{name}:{score.reason}" for name, score in zip(names, scores, strict=True) if score and score.reason]
    return ",".join(found) or None
