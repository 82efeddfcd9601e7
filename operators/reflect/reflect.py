"""The part that both reflections share: turns rows into calls, and replies into columns.

If a reply cannot be read, the teacher gets one more turn, with its own reply and what is wrong with it. If the second
reply cannot be read either, the row keeps its original and the first reason.
"""

import ast
import hashlib
import inspect
import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Literal

import pyarrow as pa
from ray.data import Dataset

from operators import thoughts
from operators.chat_markup import escape
from operators.columns import ACTIVE, CALL_FAILED, REJECTED, conform
from operators.reflect import (
    parse_replies,
    placeholders,
    refusals,
    remarks,
    reply_headings,
    reply_json,
    reply_parts,
    rewrite_text,
)
from operators.reflect.config import ReflectConfig
from operators.reflect.parse_replies import Parsed, Rejected, parse_reply
from operators.reflect.prompts import REPAIRABLE, Prompter, ReplyFormat, Style, Task
from operators.stage import require_columns
from operators.teacher.config import TeacherConfig
from operators.teacher.ledger import REPLY_COLUMNS, Ledger

PARSER = (
    parse_replies,
    reply_headings,
    reply_json,
    reply_parts,
    rewrite_text,
    placeholders,
    remarks,
    thoughts,
    refusals,
)
SHOWN = ("input", "turns_before")  # columns that a prompt shows in addition to the pair, if the rows have them
WITHOUT_REPLY = "rows_without_reply"  # a metric: rows whose calls failed, in this run or, as often as allowed, earlier
UNREAD_REPLIES = "unread_replies"  # a metric: reason why replies could not be read -> how many
REPAIR = "_repair"  # added to the stage's name for its second turns in the ledger


@dataclass(frozen=True)
class Reflection:
    """The arguments that both reflections get.

    Attributes:
        config: the section `reflect`.
        teacher: who answers.
        ledger: keeps every reply.
        special_tokens: control tokens of teacher and student; they are broken up in the teacher's texts, as in the
            source.
    """

    config: ReflectConfig
    teacher: TeacherConfig
    ledger: Ledger
    special_tokens: frozenset[str]


@dataclass(frozen=True)
class Reflecting:
    """One of the two reflections: its task, the columns that it reads, and the columns for the answers."""

    stage: str
    task: Task
    part: Literal["instructions", "responses"]  # of the configuration
    columns_in: tuple[str, str]  # instruction and response to reflect on
    columns_out: tuple[str, ...]  # one for each section
    critique_column: str
    status_column: str
    schema_out: pa.Schema

    def prompter(self, config: ReflectConfig) -> Prompter:
        """The prompter of this reflection, as configured."""
        own = config.prompts_of(self.part)
        return Prompter(self.task, config.form, config.style, own.criteria, own.template, own.system)


def reflect(rows: Dataset, about: Reflecting, reflection: Reflection) -> Dataset:
    """Ask the teacher about every active row and put its texts into new columns; see the two stages.

    Rewritten texts are escaped like the source, so that the teacher cannot write control tokens either.
    """
    config, teacher, ledger = reflection.config, reflection.teacher, reflection.ledger
    special_tokens = reflection.special_tokens
    answered = ledger.answer(reflection_calls(rows, about, config, special_tokens), teacher, about.stage)
    first = _read(answered, about, reflection)
    if config.repair:
        # Held in the object store, which spills to disk: asking again reads it three times.
        unread = _repair_calls(first.materialize(), about, reflection)
        answered = ledger.answer(unread, teacher, f"{about.stage}{REPAIR}", optional=True)
        first = _read(answered, about, reflection, repaired=True)
    return first.map_batches(partial(conform, schema=about.schema_out), batch_format="pyarrow", num_cpus=0.25)


def known_repair_calls(rows: Dataset, about: Reflecting, reflection: Reflection) -> Dataset:
    """The rows with the columns of the repair calls that follow from replies in the ledger; this makes no call."""
    calls = reflection_calls(rows, about, reflection.config, reflection.special_tokens)
    answered = reflection.ledger.stored(calls, reflection.teacher, about.stage)
    return _repair_calls(_read(answered, about, reflection), about, reflection)


def count_unread(rows: Dataset, about: Reflecting) -> dict[str, int | dict[str, int]]:
    """UNREAD_REPLIES and WITHOUT_REPLY of the result of `reflect`, both after the repair turn."""
    counts: Counter[str] = Counter()
    for batch in rows.select_columns([about.status_column]).iter_batches(batch_size=None, batch_format="pyarrow"):
        table: pa.Table = batch
        for each in table[about.status_column].value_counts().to_pylist():
            counts[each["values"] or ""] += each["counts"]
    refused = {status.removeprefix(REJECTED): n for status, n in counts.most_common() if status.startswith(REJECTED)}
    without = refused.pop(CALL_FAILED, 0)
    return {UNREAD_REPLIES: refused, WITHOUT_REPLY: without}


def reflection_version(about: Reflecting) -> str:
    """A version that changes with every word of the prompt and with the parser, so that finished reflections get stale.

    Calls are keyed by prompt in the ledger, so a new parser reads the stored replies and costs no call.
    """
    forms: tuple[ReplyFormat, ...] = ("json", "delimited")
    styles: tuple[Style, ...] = ("papers", "concise")
    prompts = []
    for asked in (Prompter(about.task, form, style) for form in forms for style in styles):
        prompts += [asked.content("row", "instruction", "input", "response", [{"role": "user", "content": "turn"}])]
        prompts += map(asked.repair, REPAIRABLE)
    texts = {"prompt": "".join(prompts), "parser": "".join(map(_statements, PARSER))}
    return ", ".join(f"{name} {hashlib.sha256(text.encode()).hexdigest()[:8]}" for name, text in texts.items())


def _statements(module: ModuleType) -> str:
    """The code of a module without comments and docstrings, which do not affect results."""
    tree = ast.parse(inspect.getsource(module))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def reflection_calls(
    rows: Dataset, about: Reflecting, config: ReflectConfig, special_tokens: frozenset[str]
) -> Dataset:
    """The rows with the columns of a teacher call: the calls of `reflect`, without making them."""
    require_columns(about.stage, ["row_id", "input", "outcome", *about.columns_in], rows.columns() or [])
    add = partial(_add_calls, about=about, config=config, special_tokens=special_tokens)
    return rows.map_batches(add, batch_format="pyarrow", num_cpus=0.25)


def _add_calls(rows: pa.Table, about: Reflecting, config: ReflectConfig, special_tokens: frozenset[str]) -> pa.Table:
    prompter = about.prompter(config)
    messages: list[str | None] = []
    shown = [name for name in SHOWN if name in rows.column_names]
    for row in rows.select(["row_id", "outcome", *shown, *about.columns_in]).to_pylist():
        if row["outcome"] != ACTIVE:
            messages.append(None)
            continue
        turns = turns_of(row.get("turns_before"), special_tokens)
        texts = (row[about.columns_in[0]], row["input"], row[about.columns_in[1]])
        asked = prompter.messages(prompter.content(row["row_id"], *texts, turns))
        messages.append(json.dumps(asked, ensure_ascii=False))
    size = rows.num_rows
    rows = rows.append_column("messages", pa.array(messages, pa.string()))
    rows = rows.append_column("schema", pa.array([prompter.schema()] * size, pa.string()))
    return rows.append_column("max_tokens", pa.array([config.max_tokens] * size, pa.int32()))


def _read(answered: Dataset, about: Reflecting, reflection: Reflection, *, repaired: bool = False) -> Dataset:
    read = partial(
        read_replies,
        about=about,
        config=reflection.config,
        special_tokens=reflection.special_tokens,
        repaired=repaired,
    )
    return answered.map_batches(read, batch_format="pyarrow", num_cpus=0.25)


def _repair_calls(first: Dataset, about: Reflecting, reflection: Reflection) -> Dataset:
    add = partial(_add_repairs, about=about, config=reflection.config, special_tokens=reflection.special_tokens)
    return first.map_batches(add, batch_format="pyarrow", num_cpus=0.25)


def turns_of(turns_before: str | None, special_tokens: frozenset[str]) -> list[dict[str, str]]:
    """The turns before an instruction, with chat markup broken up; empty for a row that is not a dialogue."""
    turns = json.loads(turns_before) if turns_before else []
    return [
        {"role": re.sub(r"\W", "", str(turn["role"])), "content": escape(str(turn["content"] or ""), special_tokens)}
        for turn in turns
    ]


def _add_repairs(rows: pa.Table, about: Reflecting, config: ReflectConfig, special_tokens: frozenset[str]) -> pa.Table:
    """The columns of a second call for rows whose reply could not be read; the others ask nothing."""
    reasons = [(status or "").removeprefix(REJECTED) for status in rows[about.status_column].to_pylist()]
    replies_so_far = rows["reply"].to_pylist()
    rows = _add_calls(rows.drop_columns(list(REPLY_COLUMNS)), about, config, special_tokens)
    prompter = about.prompter(config)
    messages: list[str | None] = []
    for first, reply, reason in zip(rows["messages"].to_pylist(), replies_so_far, reasons, strict=True):
        if first is None or reason not in REPAIRABLE:
            messages.append(None)
            continue
        shown = escape((reply or "")[: config.repair_chars], special_tokens)
        turns = [
            {"role": "assistant", "content": shown},
            {"role": "user", "content": prompter.repair(reason)},
        ]
        messages.append(json.dumps([*json.loads(first), *turns], ensure_ascii=False))
    place = rows.column_names.index("messages")
    return rows.set_column(place, "messages", pa.array(messages, pa.string()))


def read_replies(
    rows: pa.Table,
    about: Reflecting,
    config: ReflectConfig,
    special_tokens: frozenset[str],
    *,
    repaired: bool = False,
) -> pa.Table:
    """Put the teacher's texts into the columns of `about`; rows that ask nothing get nulls.

    Args:
        rows: with the columns of a reply.
        about: which reflection.
        config: the form of the reply.
        special_tokens: broken up in the teacher's texts.
        repaired: these are replies to a second turn; a row without a readable one keeps its columns.
    """
    prompter = about.prompter(config)
    criteria = prompter.criteria_asked()
    names = (*about.columns_out, about.critique_column, about.status_column)
    new: dict[str, list[str | None]] = {name: [] for name in names}
    kept = list(names) if repaired else []
    for row in rows.select(["outcome", "reply", "finish_reason", *kept]).to_pylist():
        values = [row.get(name) for name in names]
        if row["outcome"] == ACTIVE and (not repaired or row["reply"] is not None):
            parsed = parse_reply(
                row["reply"],
                row["finish_reason"],
                config.form,
                criteria,
                about.task.sections,
                critique_chars=config.critique_chars,
                text_chars=config.text_chars,
            )
            if isinstance(parsed, Parsed) and any(map(prompter.is_repeated_in, parsed.texts.values())):
                parsed = Rejected("prompt_in_text")
            if isinstance(parsed, Parsed):
                texts = [escape(text, special_tokens) for text in parsed.texts.values()]
                status = "repaired" if repaired else "parsed"
                values = [*texts, json.dumps(parsed.critique, ensure_ascii=False), status]
            elif not repaired:
                values[-1] = f"{REJECTED}{parsed.reason}"
        for column, value in zip(new.values(), values, strict=True):
            column.append(value)
    rows = rows.drop_columns(kept)
    for name, column in new.items():
        rows = rows.append_column(name, pa.array(column, pa.string()))
    return rows
