"""The teacher as a judge of pairs: it reads an instruction with its answer and scores it with a whole number, 1 to 10.

Each candidate is judged by itself, because two candidates may have different instructions. Only rows with two
candidates are judged; a pair that both selections compare is judged once. Texts are put between fences that contain a
hash of the texts inside, see `own_prompt.judge_prompt`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import pyarrow as pa
from ray.data import Dataset

from operators.chat_markup import escape
from operators.columns import ACTIVE, CALL_FAILED
from operators.own_prompt import SHIPPED, PromptConfig, judge_prompt
from operators.select.ifd import Pair, Score, Turn, ifd_turn
from operators.teacher.config import TeacherConfig
from operators.teacher.ledger import REPLY_COLUMNS, Ledger
from operators.verdict import number_of, verdict_in

STAGE = "judge"  # of the ledger, and of `teacher.stages`
LOWEST, HIGHEST = 1, 10
SIDES = ("judged_old", "judged_new")  # columns used only inside this module: a score as JSON, or null

_OPENING: Final = "Here is an example from which an assistant is to learn: a request and its answer."
_REQUEST: Final = (
    "Judge how good the example is: whether the request is clear and worth answering, and how helpful, relevant, "
    "accurate and suitably detailed the answer is. A longer text is not a better one."
)
_REPLY_FORM: Final = (
    "Reply with one JSON object: critique, one or two sentences; then score, a whole number from 1 (useless) to 10 "
    "(could not be better)."
)
SCHEMA: Final = json.dumps(
    {
        "type": "object",
        "properties": {
            "critique": {"type": "string"},
            "score": {"type": "integer", "minimum": LOWEST, "maximum": HIGHEST},
        },
        "required": ["critique", "score"],
        "additionalProperties": False,
    }
)

Candidates = Callable[[dict[str, Any]], tuple[Pair, Pair | None]]


@dataclass(frozen=True)
class Judge:
    """The teacher as a judge, and where the verdicts are kept.

    Attributes:
        teacher: of the stage `judge`.
        ledger: keeps every reply.
        max_tokens: limit of one verdict.
        special_tokens: of all models; they are broken up in the texts, like chat markup.
        prompt: the user's own words, if there are any.
    """

    teacher: TeacherConfig
    ledger: Ledger
    max_tokens: int
    special_tokens: frozenset[str]
    prompt: PromptConfig = SHIPPED


class Judgements:
    """The judge's scores of one batch's candidates; it has the interface of `score_store.Scores`."""

    def __init__(self, rows: pa.Table, candidates: Candidates) -> None:
        """Read the columns SIDES."""
        self._known: dict[tuple[str, Turn], Score] = {}
        for row in rows.to_pylist():
            if row["outcome"] != ACTIVE:
                continue
            for side, pair in zip(SIDES, candidates(row), strict=True):
                if pair is not None and row[side] is not None:
                    self._known[row["row_id"], ifd_turn(pair)] = Score(**json.loads(row[side]))

    def of(self, turns: Sequence[tuple[str, Turn]]) -> list[Score]:
        """One score for each (row_id, turn); it is empty if the judge was not asked."""
        return [self._known.get(turn, Score()) for turn in turns]


def judged(rows: Dataset, candidates: Candidates, judge: Judge) -> Dataset:
    """The rows with the columns SIDES: the judge's scores of both candidates, for rows that have two."""
    for place, column in enumerate(SIDES):
        answered = judge.ledger.answer(pair_calls(rows, candidates, judge, place), judge.teacher, STAGE)
        # Held in the object store, which spills to disk: the next side reads it several times.
        rows = answered.map_batches(
            partial(_keep_score, column=column), batch_format="pyarrow", num_cpus=0.25
        ).materialize()
    return rows


def pair_calls(rows: Dataset, candidates: Candidates, judge: Judge, place: int) -> Dataset:
    """Add the columns of a call about the first (0) or second (1) candidate; only rows with two get a call."""
    asking = _Asking(judge.max_tokens, judge.special_tokens, judge.prompt)
    add = partial(_add_calls, place=place, candidates=candidates, judge=asking)
    return rows.map_batches(add, batch_format="pyarrow", num_cpus=0.25)


def pair_prompt(pair: Pair, special_tokens: frozenset[str] = frozenset(), own: PromptConfig = SHIPPED) -> str:
    """The prompt that asks for the score of one pair."""
    turns = json.loads(pair.turns_before) if pair.turns_before else []
    before = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
    texts = {"conversation before": before, "request": pair.instruction, "input": pair.input, "answer": pair.response}
    shown = {name: escape(text, special_tokens) for name, text in texts.items() if text}
    return judge_prompt(shown, _OPENING, _REQUEST, _REPLY_FORM, own)


def read_score(reply: str | None, finish_reason: str | None) -> Score:
    """The score in a verdict, or the reason for none: call_failed, cut_off, no_json, no_score, out_of_range."""
    if reply is None:
        return Score(reason=CALL_FAILED)
    verdict = verdict_in(reply, ["score"])
    if verdict is None:
        return Score(reason="cut_off" if finish_reason == "length" else "no_json")
    score = number_of(verdict.get("score"))
    if score is None:
        return Score(reason="no_score")
    return Score(reward=score) if LOWEST <= score <= HIGHEST else Score(reason="out_of_range")


@dataclass(frozen=True)
class _Asking:
    max_tokens: int
    special_tokens: frozenset[str]
    prompt: PromptConfig = SHIPPED


def _add_calls(rows: pa.Table, place: int, candidates: Candidates, judge: _Asking) -> pa.Table:
    messages: list[str | None] = []
    for row in rows.to_pylist():
        pairs = candidates(row) if row["outcome"] == ACTIVE else (None, None)
        pair = pairs[place] if pairs[1] is not None else None  # a single candidate is not judged
        said = None if pair is None else judge.prompt.messages(pair_prompt(pair, judge.special_tokens, judge.prompt))
        messages.append(None if said is None else json.dumps(said, ensure_ascii=False))
    size = rows.num_rows
    rows = rows.append_column("messages", pa.array(messages, pa.string()))
    rows = rows.append_column("schema", pa.array([SCHEMA] * size, pa.string()))
    return rows.append_column("max_tokens", pa.array([judge.max_tokens] * size, pa.int32()))


def _keep_score(rows: pa.Table, column: str) -> pa.Table:
    asked = rows.select(["reply", "finish_reason", "error"]).to_pylist()
    scores = [
        None
        if row["reply"] is None and not row["error"]
        else json.dumps(asdict(read_score(row["reply"], row["finish_reason"])))
        for row in asked
    ]
    return rows.drop_columns(list(REPLY_COLUMNS)).append_column(column, pa.array(scores, pa.string()))
