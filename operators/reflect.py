"""What both reflections share: their configuration, and the way from rows to calls and from replies to columns."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
from pydantic import Field
from ray.data import Dataset

from operators.chat_markup import neutralise
from operators.columns import UNDER_WAY, conform
from operators.ledger import Ledger
from operators.prompts import ReplyFormat, reply_schema
from operators.replies import Rejected, parse_reply
from operators.stage import StageConfig, require_columns
from operators.teacher import TeacherConfig


class ReflectConfig(StageConfig):
    """How the teacher is to reply."""

    form: ReplyFormat = Field("json", description="json: structured output; delimited: headings, as in the papers")
    max_tokens: int = Field(1024, ge=16, description="of one reply")
    critique_chars: int = Field(400, ge=20, description="json: longest sentence about one criterion")
    text_chars: int = Field(8000, ge=20, description="json: longest rewritten text")


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


def reflect(
    rows: Dataset,
    about: Reflecting,
    config: ReflectConfig,
    teacher: TeacherConfig,
    ledger: Ledger,
    special_tokens: frozenset[str],
) -> Dataset:
    """Ask the teacher about every row under way and put what it wrote into new columns; see the two stages.

    A rewritten text is neutralised like the source was: the teacher cannot plant control tokens either.
    """
    answered = ledger.answer(reflection_calls(rows, about, config), teacher, about.stage)
    return answered.map_batches(
        partial(read_replies, about=about, config=config, special_tokens=special_tokens),
        batch_format="pyarrow",
        num_cpus=0.25,
    )


def reflection_calls(rows: Dataset, about: Reflecting, config: ReflectConfig) -> Dataset:
    """The rows with the columns of a teacher call: what `reflect` asks, without asking it."""
    require_columns(about.stage, ["row_id", "input", "outcome", *about.columns_in], rows.columns() or [])
    return rows.map_batches(partial(_add_calls, about=about, config=config), batch_format="pyarrow", num_cpus=0.25)


def _add_calls(rows: pa.Table, about: Reflecting, config: ReflectConfig) -> pa.Table:
    schema = ""
    if config.form == "json":
        schema = reply_schema(about.criteria, about.sections, config.critique_chars, config.text_chars)
    messages: list[str | None] = []
    for row in rows.select(["row_id", "input", "outcome", *about.columns_in]).to_pylist():
        if row["outcome"] != UNDER_WAY:
            messages.append(None)
            continue
        texts = (row[about.columns_in[0]], row["input"], row[about.columns_in[1]])
        content = about.prompt(row["row_id"], *texts, config.form)
        messages.append(json.dumps([{"role": "user", "content": content}], ensure_ascii=False))
    size = rows.num_rows
    rows = rows.append_column("messages", pa.array(messages, pa.string()))
    rows = rows.append_column("schema", pa.array([schema] * size, pa.string()))
    return rows.append_column("max_tokens", pa.array([config.max_tokens] * size, pa.int32()))


def read_replies(rows: pa.Table, about: Reflecting, config: ReflectConfig, special_tokens: frozenset[str]) -> pa.Table:
    """Put what the teacher wrote into the columns of `about`; rows that were not asked get nulls."""
    new: dict[str, list[str | None]] = {
        name: [] for name in (*about.columns_out, about.critique_column, about.status_column)
    }
    for row in rows.select(["outcome", "reply", "finish_reason"]).to_pylist():
        values: list[str | None] = [None] * len(new)
        if row["outcome"] == UNDER_WAY:
            parsed = parse_reply(row["reply"], row["finish_reason"], config.form, about.criteria, about.sections)
            if isinstance(parsed, Rejected):
                values[-1] = f"rejected:{parsed.reason}"
            else:
                texts = [neutralise(text, special_tokens) for text in parsed.texts.values()]
                values = [*texts, json.dumps(parsed.critique, ensure_ascii=False), "parsed"]
        for column, value in zip(new.values(), values, strict=True):
            column.append(value)
    for name, column in new.items():
        rows = rows.append_column(name, pa.array(column, pa.string()))
    return conform(rows, about.schema_out)
