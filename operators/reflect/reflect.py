"""What both reflections share: their configuration, and the way from rows to calls and from replies to columns.

A reply that cannot be read gets one more turn: the teacher sees its own reply and what is wrong with it. If that fails
too, the row keeps its original and the first reason.
"""

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
from pydantic import Field
from ray.data import Dataset

from operators.chat_markup import escape
from operators.columns import ACTIVE, conform
from operators.reflect import parse_replies, refusals, reply_headings, reply_json, reply_parts, rewrite_text
from operators.reflect.parse_replies import Rejected, parse_reply
from operators.reflect.prompts import REPAIRABLE, ReplyFormat, repair_prompt, reply_schema
from operators.stage import StageConfig, require_columns
from operators.teacher.config import TeacherConfig
from operators.teacher.ledger import REPLY_COLUMNS, Ledger

PARSER = (parse_replies, reply_headings, reply_json, reply_parts, rewrite_text, refusals)
REPAIR = "_repair"  # after the stage's name: its second turns in the ledger


class ReflectConfig(StageConfig):
    """How the teacher is to reply."""

    form: ReplyFormat = Field("json", description="json: structured output; delimited: headings, as in the papers")
    max_tokens: int = Field(1024, ge=16, description="of one reply")
    critique_chars: int = Field(
        400,
        ge=20,
        description="What is kept of the critique by one criterion, in characters; the ledger keeps all of it.",
    )
    text_chars: int = Field(
        8000, ge=20, description="Longest rewritten text, in characters; a reply with a longer one is refused."
    )
    repair: bool = Field(True, description="one more turn for a reply that cannot be read")
    repair_chars: int = Field(4000, ge=0, description="of the unreadable reply, shown to the teacher again")


@dataclass(frozen=True)
class Reflection:
    """What every reflection is given: how to ask, whom, where the replies are kept, and what no text may hold.

    Attributes:
        config: the section `reflect`.
        teacher: who answers.
        ledger: keeps every reply.
        special_tokens: control tokens of teacher and student; broken up in what the teacher wrote, as in the source.
    """

    config: ReflectConfig
    teacher: TeacherConfig
    ledger: Ledger
    special_tokens: frozenset[str]


@dataclass(frozen=True)
class Reflecting:
    """One of the two reflections: what it asks about which columns, and where the answers go."""

    stage: str
    prompt: Callable[[str, str, str, str, ReplyFormat], str]
    criteria: dict[str, str]
    sections: dict[str, str]
    columns_in: tuple[str, str]  # instruction and response to reflect on
    columns_out: tuple[str, ...]  # one for each section
    critique_column: str
    status_column: str
    schema_out: pa.Schema


def reflect(rows: Dataset, about: Reflecting, reflection: Reflection) -> Dataset:
    """Ask the teacher about every active row and put what it wrote into new columns; see the two stages.

    A rewritten text is escaped like the source was: the teacher cannot plant control tokens either.
    """
    config, teacher, ledger = reflection.config, reflection.teacher, reflection.ledger
    special_tokens = reflection.special_tokens
    read = partial(read_replies, about=about, config=config, special_tokens=special_tokens)
    answered = ledger.answer(reflection_calls(rows, about, config), teacher, about.stage)
    first = answered.map_batches(read, batch_format="pyarrow", num_cpus=0.25)
    if config.repair:
        # Held in the object store, which spills to disk: asking again reads it three times.
        unread = first.materialize().map_batches(
            partial(_add_repairs, about=about, config=config, special_tokens=special_tokens),
            batch_format="pyarrow",
            num_cpus=0.25,
        )
        answered = ledger.answer(unread, teacher, f"{about.stage}{REPAIR}", optional=True)
        first = answered.map_batches(partial(read, repaired=True), batch_format="pyarrow", num_cpus=0.25)
    return first.map_batches(partial(conform, schema=about.schema_out), batch_format="pyarrow", num_cpus=0.25)


def reflection_version(about: Reflecting) -> str:
    """Changes with every word of the prompt and with the parser, so that a finished reflection is known to be stale.

    The ledger knows prompts by themselves: a new parser reads the stored replies and costs no call.
    """
    forms: tuple[ReplyFormat, ...] = ("json", "delimited")
    prompts = [about.prompt("row", "instruction", "input", "response", form) for form in forms]
    prompts += [repair_prompt(reason, form, about.criteria, about.sections) for form in forms for reason in REPAIRABLE]
    texts = {"prompt": "".join(prompts), "parser": "".join(map(inspect.getsource, PARSER))}
    return ", ".join(f"{name} {hashlib.sha256(text.encode()).hexdigest()[:8]}" for name, text in texts.items())


def reflection_calls(rows: Dataset, about: Reflecting, config: ReflectConfig) -> Dataset:
    """The rows with the columns of a teacher call: what `reflect` asks, without asking it."""
    require_columns(about.stage, ["row_id", "input", "outcome", *about.columns_in], rows.columns() or [])
    return rows.map_batches(partial(_add_calls, about=about, config=config), batch_format="pyarrow", num_cpus=0.25)


def _add_calls(rows: pa.Table, about: Reflecting, config: ReflectConfig) -> pa.Table:
    schema = ""
    if config.form == "json":
        schema = reply_schema(about.criteria, about.sections)
    messages: list[str | None] = []
    for row in rows.select(["row_id", "input", "outcome", *about.columns_in]).to_pylist():
        if row["outcome"] != ACTIVE:
            messages.append(None)
            continue
        texts = (row[about.columns_in[0]], row["input"], row[about.columns_in[1]])
        content = about.prompt(row["row_id"], *texts, config.form)
        messages.append(json.dumps([{"role": "user", "content": content}], ensure_ascii=False))
    size = rows.num_rows
    rows = rows.append_column("messages", pa.array(messages, pa.string()))
    rows = rows.append_column("schema", pa.array([schema] * size, pa.string()))
    return rows.append_column("max_tokens", pa.array([config.max_tokens] * size, pa.int32()))


def _add_repairs(rows: pa.Table, about: Reflecting, config: ReflectConfig, special_tokens: frozenset[str]) -> pa.Table:
    """The columns of a second call for rows whose reply could not be read; the others ask nothing."""
    reasons = [(status or "").removeprefix("rejected:") for status in rows[about.status_column].to_pylist()]
    replies_so_far = rows["reply"].to_pylist()
    rows = _add_calls(rows.drop_columns(list(REPLY_COLUMNS)), about, config)
    messages: list[str | None] = []
    for first, reply, reason in zip(rows["messages"].to_pylist(), replies_so_far, reasons, strict=True):
        if first is None or reason not in REPAIRABLE:
            messages.append(None)
            continue
        shown = escape((reply or "")[: config.repair_chars], special_tokens)
        turns = [
            {"role": "assistant", "content": shown},
            {"role": "user", "content": repair_prompt(reason, config.form, about.criteria, about.sections)},
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
    """Put what the teacher wrote into the columns of `about`; rows that were not asked get nulls.

    Args:
        rows: with the columns of a reply.
        about: which reflection.
        config: the form of the reply.
        special_tokens: broken up in what the teacher wrote.
        repaired: these are replies to a second turn; a row without a readable one keeps what it had.
    """
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
                about.criteria,
                about.sections,
                critique_chars=config.critique_chars,
                text_chars=config.text_chars,
            )
            if not isinstance(parsed, Rejected):
                texts = [escape(text, special_tokens) for text in parsed.texts.values()]
                status = "repaired" if repaired else "parsed"
                values = [*texts, json.dumps(parsed.critique, ensure_ascii=False), status]
            elif not repaired:
                values[-1] = f"rejected:{parsed.reason}"
        for column, value in zip(new.values(), values, strict=True):
            column.append(value)
    rows = rows.drop_columns(kept)
    for name, column in new.items():
        rows = rows.append_column(name, pa.array(column, pa.string()))
    return rows
