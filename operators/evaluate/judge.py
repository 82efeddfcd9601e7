"""The teacher compares two answers to one request, in both orders, and says which model answered better.

Protocol of arXiv 2402.10110 (section "Evaluation Metrics"): in each order both answers get a score from 1 to 10. An
answer that is better in one order and not worse in the other wins; everything else is a tie. The texts are fenced, see
`own_prompt.judge_prompt`.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Final

import pyarrow as pa
import ray

from operators.chat_markup import escape
from operators.evaluate.length_control import length_controlled_win_rate
from operators.evaluate.results import LOSS, TIE, UNPARSED, WIN, Judgement, Sample, Verdicts
from operators.own_prompt import SHIPPED, PromptConfig, judge_prompt
from operators.teacher.config import TeacherConfig
from operators.teacher.ledger import Ledger
from operators.verdict import number_of, verdict_in

STAGE = "judge"
BASE_FIRST, STUDENT_FIRST = "base_first", "student_first"
ORDERS = (BASE_FIRST, STUDENT_FIRST)
LOWEST, HIGHEST = 1, 10
SCORE_NAMES = ("score_a", "score_b")
_WON = {WIN: 1.0, TIE: 0.5, LOSS: 0.0}
LENGTH_TOLERANCE = 0.2  # of the longer answer

Scores = tuple[float, float]
Replies = dict[str, tuple[str | None, str | None]]

_OPENING: Final = "Two assistants, A and B, were given the same request. Compare their answers."
_REQUEST: Final = (
    "Judge each answer by how helpful, relevant, accurate and suitably detailed it is. The order of the two means "
    "nothing, and a longer answer is not a better one."
)
_SCORE_KEYS = "score_a and score_b, whole numbers from 1 (useless) to 10 (could not be better)"


def judge_samples(
    samples: Sequence[Sample],
    teacher: TeacherConfig,
    ledger: Ledger,
    max_tokens: int,
    *,
    critique: bool,
    special_tokens: frozenset[str] = frozenset(),
    own: PromptConfig = SHIPPED,
) -> list[Sample]:
    """Let the teacher judge every pair of answers in both orders; identical answers tie without a call.

    Args:
        samples: held-out rows with two answers, `base` and `student`.
        teacher: the judge.
        ledger: keeps the judge's replies; only calls that it lacks are made.
        max_tokens: limit of one verdict.
        critique: whether the judge explains itself before it scores.
        special_tokens: of the judge; they are broken up in all texts, like chat markup.
        own: the user's own words for the judge, if there are any.

    Returns:
        The samples in their order, each with verdict, scores and reasons.
    """
    different = [sample for sample in samples if sample.base != sample.student]
    replies: Replies = {}
    if different:
        calls = ray.data.from_arrow(verdict_calls(different, max_tokens, critique, special_tokens, own))
        for row in ledger.answer(calls, teacher, STAGE).iter_rows():
            replies[row["row_id"]] = row["reply"], row["finish_reason"]
    return [sample.model_copy(update=_judged(sample, replies)) for sample in samples]


def verdict_calls(
    samples: Sequence[Sample],
    max_tokens: int,
    critique: bool,
    special_tokens: frozenset[str],
    own: PromptConfig,
) -> pa.Table:
    """The calls about these samples, two per sample; `row_id` contains the order of the answers."""
    calls, schema = [], verdict_schema(critique=critique)
    prompt_of = partial(pair_prompt, critique=critique, special_tokens=special_tokens, own=own)
    for sample in samples:
        for order in ORDERS:
            answers = (sample.base, sample.student) if order == BASE_FIRST else (sample.student, sample.base)
            prompt = prompt_of(sample.instruction, sample.input, *answers, sample.turns_before)
            messages = json.dumps(own.messages(prompt), ensure_ascii=False)
            calls.append((f"{sample.row_id}:{order}", messages, schema, max_tokens))
    kinds = {"row_id": pa.string(), "messages": pa.string(), "schema": pa.string(), "max_tokens": pa.int32()}
    columns = zip(*calls, strict=True)
    return pa.table({name: pa.array(column, kind) for (name, kind), column in zip(kinds.items(), columns, strict=True)})


def verdict_schema(*, critique: bool) -> str:
    """The JSON schema of a verdict; the critique comes first, so that the scores can follow from it."""
    score = {"type": "integer", "minimum": LOWEST, "maximum": HIGHEST}
    explained = {"critique": {"type": "string"}} if critique else {}
    properties = {**explained, "score_a": score, "score_b": score}
    return json.dumps(
        {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    )


def pair_prompt(
    instruction: str,
    input_text: str,
    answer_a: str,
    answer_b: str,
    turns_before: str = "",
    *,
    critique: bool,
    special_tokens: frozenset[str] = frozenset(),
    own: PromptConfig = SHIPPED,
) -> str:
    """The prompt that asks for a score of each answer; every text is fenced, and chat markup inside is broken up.

    Args:
        instruction: what both assistants were asked.
        input_text: what it was asked about; "" if there is none.
        answer_a: the answer that is shown first.
        answer_b: the other one.
        turns_before: the dialogue before the instruction, a JSON list of {"role", "content"}; "" if there is none.
        critique: whether the judge explains itself before it scores.
        special_tokens: of the judge; see `chat_markup.escape`.
        own: the user's own words for the judge, if there are any.
    """
    texts = {"conversation before": _transcript(turns_before)} if turns_before else {}
    texts |= {"request": instruction, "input": input_text, "answer A": answer_a, "answer B": answer_b}
    texts = {name: escape(text or "", special_tokens) for name, text in texts.items()}
    keys = f"critique, one or two sentences; then {_SCORE_KEYS}" if critique else _SCORE_KEYS
    return judge_prompt(texts, _OPENING, _REQUEST, f"Reply with one JSON object: {keys}.", own)


def parse_verdict(reply: str | None, finish_reason: str | None) -> Scores | str:
    """Read the scores of answers A and B, in that order, or give the reason why they cannot be read.

    Returns:
        The scores, or a reason: "call_failed", "cut_off", "no_json", "no_scores", "out_of_range".
    """
    if reply is None:
        return "call_failed"
    verdict = verdict_in(reply, SCORE_NAMES)
    if verdict is None:
        return "cut_off" if finish_reason == "length" else "no_json"
    one, other = (number_of(verdict.get(name)) for name in SCORE_NAMES)
    if one is None or other is None:
        return "no_scores"
    if not (LOWEST <= one <= HIGHEST and LOWEST <= other <= HIGHEST):
        return "out_of_range"
    return one, other


def pair_verdict(base_first: Scores | None, student_first: Scores | None) -> str:
    """The student's win, tie or loss, from the scores (base, student) of both orders."""
    if base_first is None or student_first is None:
        return UNPARSED
    signs = [
        math.copysign(1, student - base) if student != base else 0 for base, student in (base_first, student_first)
    ]
    if sum(signs) == 0:
        return TIE
    return WIN if sum(signs) > 0 else LOSS


def tally(samples: Sequence[Sample]) -> Judgement:
    """Counts and rates over judged samples."""
    matched = [sample for sample in samples if lengths_match(sample.base_tokens, sample.student_tokens)]
    reasons = Counter(reason for sample in samples for reason in sample.unparsed.values())
    return Judgement(
        **verdicts(samples).model_dump(),
        unparsed=sum(sample.verdict == UNPARSED for sample in samples),
        unparsed_reasons=dict(reasons),
        length_matched=verdicts(matched),
        mean_tokens={
            "base": _mean(sample.base_tokens for sample in samples),
            "student": _mean(sample.student_tokens for sample in samples),
        },
    )


def verdicts(samples: Sequence[Sample]) -> Verdicts:
    """Wins, ties and losses of the student over judged samples."""
    decided = [sample for sample in samples if sample.verdict in _WON]
    counts = Counter(sample.verdict for sample in decided)
    wins, ties, losses = counts[WIN], counts[TIE], counts[LOSS]
    pairs = len(decided)
    return Verdicts(
        num_pairs=pairs,
        wins=wins,
        ties=ties,
        losses=losses,
        win_margin=(wins - losses) / pairs if pairs else None,
        win_rate=(wins + ties / 2) / pairs if pairs else None,
        length_controlled_win_rate=length_controlled_win_rate(
            [_WON[sample.verdict or ""] for sample in decided],
            [(sample.base_tokens, sample.student_tokens) for sample in decided],
        ),
        sign_test_p=sign_test_p(wins, losses) if pairs else None,
    )


def lengths_match(one: int, other: int) -> bool:
    """Whether two lengths differ by less than a fifth of the longer."""
    return abs(one - other) < LENGTH_TOLERANCE * max(one, other) or one == other


def sign_test_p(wins: int, losses: int) -> float:
    """Two-sided probability of a split at least this uneven between two equally good models; ties do not count."""
    total, fewer = wins + losses, min(wins, losses)
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    return min(1.0, float(2 * tail / 2**total))


def _judged(sample: Sample, replies: Replies) -> dict[str, Any]:
    """The fields of a sample that hold its verdict."""
    if sample.base == sample.student:
        return {"verdict": TIE, "scores": dict.fromkeys(ORDERS), "unparsed": {}}
    scores: dict[str, Scores | None] = {}
    unparsed: dict[str, str] = {}
    for order in ORDERS:
        parsed = parse_verdict(*replies.get(f"{sample.row_id}:{order}", (None, None)))
        if isinstance(parsed, str):
            scores[order], unparsed[order] = None, parsed
        else:
            scores[order] = parsed if order == BASE_FIRST else (parsed[1], parsed[0])
    return {
        "verdict": pair_verdict(scores[BASE_FIRST], scores[STUDENT_FIRST]),
        "scores": scores,
        "unparsed": unparsed,
    }


def _transcript(turns: str) -> str:
    """The turns as plain text: the role, a colon, and the content."""
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in json.loads(turns)) if turns else ""


def _mean(values: Iterable[int]) -> float | None:
    listed = list(values)
    return sum(listed) / len(listed) if listed else None
