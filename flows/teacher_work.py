"""Counts the teacher calls that a run would make: reflections, repairs and calls of the judge.

The calls of a stage are known exactly if its input exists. Otherwise the number is an upper limit: a row has at most
one repair per stage, three judged pairs, and two orders of its answers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import ray
from ray.data import Dataset

from flows.graph import (
    EVALUATION,
    HELD_OUT,
    INSTRUCTION_REFLECTIONS,
    RAW_INSTRUCTIONS,
    RECYCLED_INSTRUCTIONS,
    RESPONSE_REFLECTIONS,
    SELECTED_INSTRUCTIONS,
)
from flows.releases import rivals
from flows.run import Run, rows_where
from operators.columns import HELD_OUT as HELD_OUT_OUTCOME
from operators.columns import RAW
from operators.evaluate.evaluate import sampled_rows
from operators.evaluate.judge import verdict_calls
from operators.evaluate.release_history import ReleaseHistory
from operators.evaluate.results import Sample
from operators.reflect.filter_rewrites import filter_rewrites
from operators.reflect.reflect import REPAIR, Reflecting, known_repair_calls, reflection_calls
from operators.reflect.reflect_instructions import ABOUT as INSTRUCTIONS
from operators.reflect.reflect_responses import ABOUT as RESPONSES
from operators.select.ifd import Pair
from operators.select.judge import STAGE as JUDGE
from operators.select.judge import pair_calls
from operators.select.select import instruction_choice, response_choice
from operators.teacher.budget import Tokens

JUDGE_SELECTS, JUDGE_EVALUATES = "judge of select", "judge of evaluate"
Reach = Literal["", "about ", "at most "]
ABOUT: Reach = "about "
AT_MOST: Reach = "at most "
PAIRS_JUDGED = 3  # at most per row: the original, and the result of each of the two reflections
ANSWERS = 2  # compared by a verdict


@dataclass(frozen=True)
class Work:
    """The calls of one kind.

    Attributes:
        name: the kind, as printed.
        new: number of calls to make.
        known: number of calls that the ledger answers.
        over_long: number of new calls that are too long for the teacher, which fail without being made.
        tokens: total of the new calls.
        reach: whether `new` is an estimate or an upper limit; exact if empty.
        lengths_known: whether lengths of replies are estimated from earlier replies, instead of being the limit.
    """

    name: str
    new: int
    known: int = 0
    over_long: int = 0
    tokens: Tokens = field(default_factory=Tokens)
    reach: Reach = ""
    lengths_known: bool = False

    @classmethod
    def counted(cls, name: str, count: dict[str, int], reach: Reach = "") -> "Work":
        """Create this from the result of `Ledger.count_calls`."""
        tokens = Tokens(count["prompt_tokens"], count["reply_tokens"])
        known = count["asked"] - count["new"]
        return cls(name, count["new"], known, count["over_long"], tokens, reach, bool(count["known_replies"]))

    @property
    def asked(self) -> int:
        """Number of all calls."""
        return self.new + self.known


def teacher_work(run: Run, refresh: str, canary: int = 0) -> list[Work]:
    """Count the calls of a whole run by kind, in the order of the graph.

    Args:
        run: the configuration and its storage.
        refresh: the batch of source data.
        canary: number of calls that each reflection makes first, for better estimates.
    """
    raw = _made(run, RAW_INSTRUCTIONS, refresh)
    if raw is None:
        raw = run.raw_rows(refresh).materialize()
    selected = _made(run, SELECTED_INSTRUCTIONS, refresh)
    first = _reflection(run, raw, INSTRUCTIONS, canary)
    # Every row is asked about again, whatever is selected. Before the selection, the original stands for its result.
    if selected is None:
        second = _reflection(run, _as_selected(raw), RESPONSES, 0, AT_MOST)
    else:
        second = _reflection(run, selected, RESPONSES, canary)
    works = [first, *_repairs(run, raw, first, INSTRUCTIONS, INSTRUCTION_REFLECTIONS, refresh)]
    works += [second, *_repairs(run, selected, second, RESPONSES, RESPONSE_REFLECTIONS, refresh)]
    if run.config.select.policy == "judge":
        works += _selection(run, raw, selected, refresh)
    return [*works, *_evaluation(run, raw, refresh)]


def _made(run: Run, asset: str, refresh: str) -> Dataset | None:
    return None if run.staleness.is_stale(asset, refresh, refresh) else run.store.rows(asset, [refresh])


def _as_selected(raw: Dataset) -> Dataset:
    return raw.map_batches(_originals, batch_format="pyarrow", num_cpus=0.25)


def _originals(rows: pa.Table) -> pa.Table:
    for name in ("instruction", "response"):
        rows = rows.append_column(f"selected_{name}", rows[name])
    return rows


def _reflection(run: Run, rows: Dataset, about: Reflecting, canary: int, reach: Reach = "") -> Work:
    calls, ledger = reflection_calls(rows, about, run.config.reflect, run.special_tokens), run.ledger()
    if canary:
        ledger.answer(calls, run.teacher, about.stage, first=canary)
    count = ledger.count_calls(calls, run.teacher, about.stage)
    return Work.counted(about.stage, count, reach if count["new"] else "")


def _repairs(
    run: Run, rows: Dataset | None, first: Work, about: Reflecting, asset: str, refresh: str
) -> Iterator[Work]:
    """Count repairs: those of stored replies, and those of future replies, estimated by the share of earlier ones."""
    if not run.config.reflect.repair or not run.staleness.is_stale(asset, refresh, refresh):
        return
    ledger, stage = run.ledger(), f"{about.stage}{REPAIR}"
    known = Work(stage, 0)
    if rows is not None and first.known:
        calls = known_repair_calls(rows, about, run.reflection(ledger))
        known = Work.counted(stage, ledger.count_calls(calls, run.teacher, stage))
    asked, repaired = (ledger.files.count(name) for name in (about.stage, stage))
    to_come = first.new - first.over_long
    new = -(-to_come * min(repaired, asked) // asked) if asked else to_come
    # The prompt of a repair has the first prompt and its reply; its reply is as long as the first.
    prompt, reply = (
        number * new // to_come if to_come else 0 for number in (first.tokens.prompt, first.tokens.generated)
    )
    tokens = known.tokens + Tokens(prompt + reply, reply)
    reach: Reach = "" if not to_come else ABOUT if asked else AT_MOST
    lengths_known = known.lengths_known or first.lengths_known
    yield Work(stage, known.new + new, known.known, known.over_long, tokens, reach, lengths_known)


def _selection(run: Run, raw: Dataset, selected: Dataset | None, refresh: str) -> Iterator[Work]:
    """Count calls of the judge of pairs: exact for a selection whose reflections exist, otherwise an upper limit."""
    reflected, answered = (_made(run, asset, refresh) for asset in (INSTRUCTION_REFLECTIONS, RESPONSE_REFLECTIONS))
    config, works = run.config, []
    if selected is None:
        [old] = _judged_pairs(run, raw, _pair_of_raw, places=(0,))
        to_come = PAIRS_JUDGED * old.asked - old.known
        if reflected is not None:
            usable = filter_rewrites(reflected, INSTRUCTIONS, config.filter, run.evaluation_index(reflected, refresh))
            works += _judged_pairs(run, usable, instruction_choice(config.select).candidates)
            # The second selection has one of its two pairs from the ledger if the first one judged two.
            to_come = 2 * old.asked - works[0].asked
        works.append(_at_most(run, old, to_come))
    elif answered is None:
        [old] = _judged_pairs(run, selected, _pair_of_selected, places=(0,))
        works.append(_at_most(run, old, old.new + old.asked))
    elif run.staleness.is_stale(RECYCLED_INSTRUCTIONS, refresh, refresh):
        usable = filter_rewrites(answered, RESPONSES, config.filter)
        works += _judged_pairs(run, usable, response_choice(config.select).candidates)
    if works:
        yield _added(works)


def _at_most(run: Run, one: Work, new: int) -> Work:
    """Scale `one`, which is work of the judge, to `new` calls of the same mean length."""
    files, tokens, size = run.ledger().files, one.tokens, one.new
    if not size:
        tokens, size = run.ledger().tokens(JUDGE), files.count(JUDGE)
    share = new / size if size else 0
    tokens = Tokens(int(tokens.prompt * share), int(tokens.generated * share))
    return Work(one.name, new, one.known, one.over_long, tokens, AT_MOST, one.lengths_known)


def _pair_of_raw(row: dict[str, Any]) -> tuple[Pair, Pair | None]:
    pair = Pair(row["instruction"], row["input"], row["response"], row.get("turns_before") or "")
    return pair, pair


def _pair_of_selected(row: dict[str, Any]) -> tuple[Pair, Pair | None]:
    pair = Pair(row["selected_instruction"], row["input"], row["selected_response"], row.get("turns_before") or "")
    return pair, pair


def _judged_pairs(run: Run, rows: Dataset, candidates: Any, places: tuple[int, ...] = (0, 1)) -> list[Work]:
    judge = run.judge(run.ledger())
    calls = [pair_calls(rows, candidates, judge, place) for place in places]
    return [Work.counted(JUDGE_SELECTS, judge.ledger.count_calls(each, judge.teacher, JUDGE)) for each in calls]


def _added(works: list[Work]) -> Work:
    new, known, over_long = (sum(getattr(work, name) for work in works) for name in ("new", "known", "over_long"))
    tokens = sum((work.tokens for work in works), Tokens())
    reach = AT_MOST if any(work.reach for work in works) else ""
    return Work(works[0].name, new, known, over_long, tokens, reach, any(work.lengths_known for work in works))


def _evaluation(run: Run, raw: Dataset, refresh: str) -> Iterator[Work]:
    """Count calls of the judge of answers: up to two per sample for the base model and for each earlier student."""
    config = run.config.evaluate
    if not config.judge or not run.staleness.is_stale(EVALUATION, None, refresh):
        return
    others = [key for key in run.store.refreshes(HELD_OUT) if key != refresh]
    held_out = rows_where(raw, HELD_OUT_OUTCOME).select_columns(RAW.names)
    if others:
        held_out = held_out.union(run.store.rows(HELD_OUT, others).select_columns(RAW.names))
    samples = [
        Sample(
            row_id=row["row_id"],
            instruction=row["instruction"],
            input=row["input"] or "",
            turns_before=row["turns_before"] or "",
            base="",
            student=" ",
            base_tokens=0,
            student_tokens=0,
        )
        for row in sampled_rows(held_out, config.num_samples)
    ]
    if not samples:
        return
    asked = verdict_calls(
        samples, config.judge_max_tokens, config.judge_critique, run.special_tokens, config.judge_prompt
    )
    one = Work.counted(JUDGE_EVALUATES, run.ledger().count_calls(ray.data.from_arrow(asked), run.teacher, JUDGE))
    answers = Tokens(asked.num_rows * ANSWERS * config.max_new_tokens)
    one = Work(one.name, one.new, 0, one.over_long, one.tokens + answers, AT_MOST, one.lengths_known)
    versus = 1 + len(rivals(ReleaseHistory(run.config.storage), run.student_version()))
    yield _at_most(run, one, one.new * versus)
