"""Reads the source into raw_instructions: every record becomes one row, good or with the reason why it is not.

All reading happens in Ray tasks, one per about `range_bytes` of source; the driver lists files and nothing more.
One hash shuffle finds exact duplicates. 200,000 JSONL records (139 MB) took 17 s on two cores that others used too.
"""

import functools
import hashlib
import itertools
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from pydantic import Field
from ray.data import Dataset

from operators import columns
from operators.chat_markup import escape
from operators.join import group_by_key
from operators.progress import report_progress
from operators.read.record_formats import Record, read_records, without_surrogates
from operators.read.source_files import Piece, SourceFile, list_source_files, plan_pieces, shown
from operators.stage import Operational, StageConfig

__all__ = ["ReadConfig", "SourceFile", "list_source_files", "read_instructions"]

STAGE = "raw_instructions"
DUPLICATE = "dropped:duplicate"
KEPT_CHARS = 2_000  # of each text of a quarantined row: enough to see what is wrong
ROWS_PER_TABLE = 1_024
SHUFFLED_BLOCK_BYTES = 4 << 20  # of source per block: small enough that the stages behind run in parallel
MAX_SHUFFLED_BLOCKS = 4_096

# C0 controls but tab, line feed and carriage return; DEL; lone surrogates, which no UTF-8 file can hold.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

# Where a record stood; dropped again once duplicates are marked.
_LOCATED = pa.schema([*columns.RAW, pa.field("file", pa.int32()), pa.field("position", pa.int64())])


class ReadConfig(StageConfig):
    """Configuration of `read_instructions`, the section `source`."""

    path: Operational[str] = Field(
        min_length=1, description="file, folder, glob or URI of .json, .jsonl and .parquet files"
    )
    limit: int | None = Field(None, gt=0, description="read only the first records in file order; for trials")
    max_chars: int = Field(32_000, gt=0, description="longest instruction, input and response together, in characters")
    held_out_fraction: float = Field(0.02, ge=0, lt=1, description="share of rows kept from teacher and training")
    split_salt: str = Field("0", description="another salt holds out other rows")
    system_turn: Literal["quarantine", "prepend"] = Field(
        "quarantine", description="what to do with a chat that has a system turn; prepend: to the instruction"
    )
    range_bytes: Operational[int] = Field(64 << 20, gt=0, description="bytes of source that one task reads")


class _Texts(NamedTuple):
    """What a record says; `reason` is empty if all three texts can be used."""

    instruction: str
    input: str
    response: str
    reason: str = ""


def read_instructions(config: ReadConfig, files: list[str], special_tokens: frozenset[str]) -> Dataset:
    """One row per record of `files`; bad records are rows with an outcome, so records in = rows out.

    Reads Alpaca columns (`instruction`, `input`, `output` or `response`) and chat `messages` with one user and one
    assistant turn. Blank lines are no records. Texts are brought to Unicode NFC and LF line ends and stripped.

    Columns out: `columns.RAW`. `row_id` is unique: the hash of the canonical texts, or of the place of a row that
    was quarantined or is a copy. `outcome` is one of
        "" (active), `dropped:held_out`, `dropped:duplicate` (not the first of its texts in file order),
        `quarantined:` + malformed_json, not_an_object, missing_field, non_string_field, empty_instruction,
        empty_response, too_long, invalid_utf8, control_characters, multi_turn, system_turn, malformed_messages,
        unreadable_file.
    A JSON array that breaks midway keeps the rows before the break and adds one malformed_json row for the rest.

    Args:
        files: paths or URIs in the order that decides which copy is the first, as from `list_source_files`.
        special_tokens: of teacher and student; broken up in the texts, which sets `escaped`.

    Raises:
        ValueError: `files` is empty.
    """
    if not files:
        raise ValueError("read_instructions: no files to read; source.path must match at least one")
    tasks = plan_pieces(files, config.range_bytes)
    if config.limit is not None:
        tasks = [list(itertools.chain.from_iterable(tasks))]
    located = ray.data.from_arrow([_piece_table(task) for task in tasks]).map_batches(
        functools.partial(_read_task, config=config, special_tokens=special_tokens),
        batch_size=None,
        batch_format="pyarrow",
    )
    shuffled = group_by_key(located, "row_id", _num_shuffled_blocks(tasks, config.limit))
    return shuffled.map_batches(_finish, batch_size=None, batch_format="pyarrow", num_cpus=0.5)


def row_id_of(instruction: str, input_: str, response: str) -> str:
    """32 hex digits of the SHA-256 of the canonical texts; neutralising comes later and does not change it."""
    return _hash([instruction, input_, response])


def canonical(text: str) -> str:
    """`text` in NFC, with LF line ends, without white space around it."""
    if "\r" in text:
        text = text.replace("\r\n", "\n")
    return unicodedata.normalize("NFC", text).strip()


def extract_texts(record: Record, config: ReadConfig) -> _Texts:
    """The texts of a record in canonical form, or as far as they are known with the reason against them."""
    if record.reason:
        return _Texts(record.raw, "", "", record.reason)
    if not isinstance(record.value, dict):
        return _Texts(record.raw or repr(record.value), "", "", "not_an_object")
    fields: dict[str, object] = record.value
    texts = _chat_texts(fields["messages"], config) if fields.get("messages") is not None else _alpaca_texts(fields)
    return texts if texts.reason else _checked(texts, config)


def _alpaca_texts(fields: dict[str, object]) -> _Texts:
    response = fields.get("output")
    found = (fields.get("instruction"), fields.get("input"), fields.get("response") if response is None else response)
    texts = _Texts(*(value if isinstance(value, str) else "" if value is None else repr(value) for value in found))
    if found[0] is None or found[2] is None:
        return texts._replace(reason="missing_field")
    if not all(isinstance(value, str) for value in found if value is not None):
        return texts._replace(reason="non_string_field")
    return texts


def _chat_texts(messages: object, config: ReadConfig) -> _Texts:
    turns: list[tuple[str, str]] = []
    for message in messages if isinstance(messages, list) else [None]:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            return _Texts(repr(messages), "", "", "malformed_messages")
        turns.append((role, content))
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else ""
    roles = [role for role, _ in turns]
    if not roles or roles != (["user", "assistant"] * len(roles))[: len(roles)] or len(roles) % 2:
        return _Texts(repr(messages), "", "", "malformed_messages")
    (_, instruction), (_, response) = turns[:2]
    if len(roles) > 2:
        return _Texts(instruction, "", response, "multi_turn")
    if system.strip() and config.system_turn == "quarantine":
        return _Texts(instruction, system, response, "system_turn")
    return _Texts(f"{system}\n\n{instruction}" if system.strip() and instruction.strip() else instruction, "", response)


def _checked(texts: _Texts, config: ReadConfig) -> _Texts:
    found = texts[:3]
    if sum(map(len, found)) > config.max_chars:
        return texts._replace(reason="too_long")
    if any(_CONTROL.search(text) for text in found):
        return texts._replace(reason="control_characters")
    clean = _Texts(*map(canonical, found))
    if not clean.instruction.strip(_INVISIBLE):
        return clean._replace(reason="empty_instruction")
    if not clean.response.strip(_INVISIBLE):
        return clean._replace(reason="empty_response")
    return clean


def _read_task(task: pa.Table, config: ReadConfig, special_tokens: frozenset[str]) -> Iterator[pa.Table]:
    pieces = [Piece(**fields) for fields in task.to_pylist()]
    records = ((piece, record) for piece in pieces for record in read_records(piece))
    rows = (_row(piece, record, config, special_tokens) for piece, record in itertools.islice(records, config.limit))
    for chunk in _chunks(rows, ROWS_PER_TABLE):
        report_progress(STAGE, rows=len(chunk))
        table = pa.table(list(map(list, zip(*chunk, strict=True))), schema=_LOCATED)
        yield _mark_copies(table)  # already here, so that a text that occurs a million times fills no single block
    yield _LOCATED.empty_table()  # a task may meet no record at all, and its block still needs the columns


def _row(piece: Piece, record: Record, config: ReadConfig, special_tokens: frozenset[str]) -> tuple[object, ...]:
    """The values of `_LOCATED`."""
    origin = shown(piece.path)
    texts = extract_texts(record, config)
    if texts.reason:
        kept = [without_surrogates(text[:KEPT_CHARS]) for text in texts[:3]]
        row_id = _hash([origin, record.position, without_surrogates(record.raw) or kept])
        return (
            row_id,
            *kept,
            "",
            "",
            "",
            "",
            origin,
            False,
            f"quarantined:{texts.reason}",
            piece.file,
            record.position,
        )
    row_id = row_id_of(*texts[:3])
    safe = [escape(text, special_tokens) for text in texts[:3]]
    outcome = columns.HELD_OUT if _is_held_out(row_id, config) else columns.ACTIVE
    return (row_id, *safe, "", "", "", "", origin, safe != list(texts[:3]), outcome, piece.file, record.position)


def _is_held_out(row_id: str, config: ReadConfig) -> bool:
    digest = hashlib.sha256(f"{config.split_salt}:{row_id}".encode()).hexdigest()
    return int(digest[:13], 16) < config.held_out_fraction * 16**13


def _finish(block: pa.Table) -> pa.Table:
    """The hash shuffle gives one block all rows of every id in it, and may give a block no rows or columns at all."""
    return columns.conform(_mark_copies(block), columns.RAW) if block.num_rows else columns.RAW.empty_table()


def _mark_copies(rows: pa.Table) -> pa.Table:
    """Of the rows with one `row_id` only the first in file order keeps id and outcome; sorted by id."""
    rows = rows.sort_by([("row_id", "ascending"), ("file", "ascending"), ("position", "ascending")])
    ids = rows["row_id"].combine_chunks()
    is_copy = pa.concat_arrays([pa.array([False]), pc.equal(ids[1:], ids[:-1])])
    copies = rows.filter(is_copy)
    if copies.num_rows == 0:
        return rows
    # A copy's id names its place: ids stay unique, so that a later join by row_id cannot multiply rows.
    places = zip(*(copies[name].to_pylist() for name in ("row_id", "origin", "position")), strict=True)
    new_ids = pa.array([_hash(place) for place in places], pa.string())
    marked = {"row_id": pc.replace_with_mask(ids, is_copy, new_ids)}
    marked["outcome"] = pc.if_else(is_copy, DUPLICATE, rows["outcome"])
    return pa.table([marked.get(name, rows[name]) for name in rows.column_names], schema=rows.schema)


def _piece_table(pieces: list[Piece]) -> pa.Table:
    return pa.Table.from_pylist([piece._asdict() for piece in pieces])


def _num_shuffled_blocks(tasks: list[list[Piece]], limit: int | None) -> int:
    blocks = math.ceil(sum(piece.end - piece.start for task in tasks for piece in task) / SHUFFLED_BLOCK_BYTES)
    if limit is not None:
        blocks = min(blocks, math.ceil(limit / ROWS_PER_TABLE))
    return max(1, min(blocks, MAX_SHUFFLED_BLOCKS))


def _chunks(rows: Iterable[tuple[object, ...]], size: int) -> Iterator[list[tuple[object, ...]]]:
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _hash(value: object) -> str:
    return hashlib.sha256(_ENCODER.encode(value).encode()).hexdigest()[:32]
