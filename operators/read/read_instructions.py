"""Reads the source into raw_instructions: every record becomes one row, good or with the reason why it is not.

All reading happens in Ray tasks, one for about `range_bytes` of source; the driver only lists files. One hash shuffle
finds exact duplicates. 200,000 JSONL records (139 MB) took 17 s on two cores that other processes used too.
"""

import functools
import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from ray.data import Dataset

from operators import columns
from operators.chat_markup import escape
from operators.join import group_by_key
from operators.outside_text import replace_surrogates
from operators.progress import report_progress
from operators.read.config import ReadConfig
from operators.read.dialogues import Exchange, as_json
from operators.read.read_record import ENCODER, extract, hash_of, row_id_of
from operators.read.record_fields import Found, extra_json, is_wanted
from operators.read.record_formats import Record, read_records
from operators.read.source_files import Piece, plan_pieces, shown

STAGE = "raw_instructions"
DUPLICATE = "dropped:duplicate"
COPY_MARK = "-"  # in the id of a copy, after the id of its first, which cannot be computed from escaped texts
KEPT_CHARS = 2_000  # of each text of a quarantined row: enough to see what is wrong
ROWS_PER_TABLE = 1_024
SHUFFLED_BLOCK_BYTES = 4 << 20  # of source per block: small enough that later stages run in parallel
MAX_SHUFFLED_BLOCKS = 4_096


# The place of a record in the source; these columns are dropped once duplicates are marked.
_LOCATED = pa.schema([*columns.RAW, pa.field("file", pa.int32()), pa.field("position", pa.int64())])


def read_instructions(
    config: ReadConfig, files: list[str], special_tokens: frozenset[str], stage: str = STAGE
) -> Dataset:
    """One row per record of `files`; bad records are rows with an outcome, so records in = rows out.

    `record_fields` says which columns are read, `dialogues` which forms of dialogues. With `turns: every` a dialogue of
    n pairs gives n rows. Blank lines are not records. Texts are converted to Unicode NFC and LF line ends, and trimmed
    except for the indentation of code.

    Columns out: `columns.RAW`. `row_id` is unique: the hash of the canonical texts, or of the place of a row that
    was quarantined; a copy has the id of its first, COPY_MARK and a hash of its place. `outcome` is one of
        "" (active), `dropped:held_out`, `dropped:duplicate` (not the first of its texts in file order),
        `quarantined:` + malformed_json, rest_malformed, malformed_csv, not_an_object, second_list, missing_parent,
        missing_field, non_string_field, empty_instruction, empty_response, too_long, too_deep, invalid_utf8,
        control_characters, system_turn, malformed_messages, non_text_content, no_plain_answer, unreadable_file.
    A JSON array that breaks midway, or a CSV file in which nothing closes a quote, keeps the rows before the break and
    adds one rest_malformed row for the rest.

    Args:
        config: how records are read.
        files: paths or URIs, as from `list_source_files`; their order decides which copy is the first.
        special_tokens: of teacher and student; they are broken up in the texts, which sets `escaped`.
        stage: name under which progress is reported.

    Raises:
        ValueError: `files` is empty.
    """
    if not files:
        raise ValueError("read_instructions: no files to read; source.path must match at least one")
    tasks = plan_pieces(files, config.range_bytes)
    if config.limit is not None:
        tasks = [list(itertools.chain.from_iterable(tasks))]
    located = ray.data.from_arrow([_piece_table(task) for task in tasks]).map_batches(
        functools.partial(_read_task, config=config, special_tokens=special_tokens, stage=stage),
        batch_size=None,
        batch_format="pyarrow",
    )
    shuffled = group_by_key(located, "row_id", _num_shuffled_blocks(tasks, config.limit))
    return shuffled.map_batches(_finish, batch_size=None, batch_format="pyarrow", num_cpus=0.5)


def count_ignored_columns(rows: Dataset) -> dict[str, dict[str, int]]:
    """{"ignored_columns": column of the source -> number of rows in which it is not empty and was not read}.

    Columns in:
        ignored_columns, as of columns.RAW.
    """
    counts: Counter[str] = Counter()
    for batch in rows.select_columns(["ignored_columns"]).iter_batches(batch_size=None, batch_format="pyarrow"):
        table: pa.Table = batch
        for each in table["ignored_columns"].value_counts().to_pylist():
            counts.update(dict.fromkeys(json.loads(each["values"] or "[]"), each["counts"]))
    return {"ignored_columns": dict(counts.most_common())}


def _read_task(task: pa.Table, config: ReadConfig, special_tokens: frozenset[str], stage: str) -> Iterator[pa.Table]:
    wanted = functools.partial(is_wanted, columns=config.columns, pass_through=config.pass_through)
    pieces = [Piece(**fields) for fields in task.to_pylist()]
    records = ((piece, record) for piece in pieces for record in read_records(piece, wanted))
    some = itertools.islice(records, config.limit)
    rows = (row for piece, record in some for row in raw_rows(piece, record, config, special_tokens))
    for chunk in _chunks(rows, ROWS_PER_TABLE):
        report_progress(stage, rows=len(chunk))
        table = pa.table(list(map(list, zip(*chunk, strict=True))), schema=_LOCATED)
        yield _mark_copies(table)  # also before the shuffle: a text that occurs a million times must not fill one block
    yield _LOCATED.empty_table()  # a task may find no record, and its block still needs the columns


def raw_rows(
    piece: Piece, record: Record, config: ReadConfig, special_tokens: frozenset[str]
) -> list[tuple[object, ...]]:
    """The values of columns.RAW, file and position, once for each pair that the teacher reflects on."""
    found = extract(record, config)
    origin = shown(piece.path)
    ignored = replace_surrogates(ENCODER.encode(sorted(found.unread))) if found.unread else ""
    extra = ""
    if config.pass_through and isinstance(record.value, dict):
        try:
            extra = extra_json(record.value, config.pass_through)
        except RecursionError:
            found = Found([Exchange(record.raw, "", "", reason="too_deep")], [])
    ids = [_id_of(pair, number, record, origin) for number, pair in enumerate(found.exchanges)]
    # A dialogue is held out as a whole, because its first pair is context of the others.
    outcome = columns.HELD_OUT if is_held_out(ids[-1], config) else columns.ACTIVE
    rows: list[tuple[object, ...]] = []
    for row_id, pair in zip(ids, found.exchanges, strict=True):
        if pair.reason:
            values = (*_kept(pair), "", "", extra, ignored, origin, False, f"quarantined:{pair.reason}")
        else:
            safe = _escaped(pair, special_tokens)
            around = _around(safe)
            values = (*safe.texts, *around, extra, ignored, origin, safe != pair, outcome)
        rows.append((row_id, *values, piece.file, record.position))
    return rows


def _around(pair: Exchange) -> tuple[str, str]:
    return (as_json(pair.before), as_json(pair.after)) if pair.before or pair.after else ("", "")


def _kept(pair: Exchange) -> list[str]:
    return [replace_surrogates(text[:KEPT_CHARS]) for text in pair.texts]


def _id_of(pair: Exchange, number: int, record: Record, origin: str) -> str:
    if not pair.reason:
        return row_id_of(*pair.texts, *_around(pair))
    place = [origin, record.position, replace_surrogates(record.raw) or _kept(pair)]
    return hash_of([*place, number] if number else place)


def _escaped(pair: Exchange, special_tokens: frozenset[str]) -> Exchange:
    instruction, given, response = [escape(text, special_tokens) for text in pair.texts]
    if not pair.before and not pair.after:
        return Exchange(instruction, given, response)
    before, after = (
        tuple(turn._replace(content=escape(turn.content, special_tokens)) for turn in turns)
        for turns in (pair.before, pair.after)
    )
    return Exchange(instruction, given, response, before, after)


def is_held_out(row_id: str, config: ReadConfig) -> bool:
    """Whether a row is kept for evaluation: a hash of its id decides, so the decision does not depend on other rows."""
    digest = hashlib.sha256(f"{config.split_salt}:{row_id}".encode()).hexdigest()
    return int(digest[:13], 16) < config.held_out_fraction * 16**13


def _finish(block: pa.Table) -> pa.Table:
    """Mark copies after the shuffle: a block holds all rows of each of its ids, or has no rows and columns at all."""
    return columns.conform(_mark_copies(block), columns.RAW) if block.num_rows else columns.RAW.empty_table()


def _mark_copies(rows: pa.Table) -> pa.Table:
    """Of rows with the same `row_id` only the first in file order keeps id and outcome; the result is sorted by id."""
    rows = rows.sort_by([("row_id", "ascending"), ("file", "ascending"), ("position", "ascending")])
    ids = rows["row_id"].combine_chunks()
    is_copy = pa.concat_arrays([pa.array([False]), pc.equal(ids[1:], ids[:-1])])
    copies = rows.filter(is_copy)
    if copies.num_rows == 0:
        return rows
    # A copy's id names its place: ids stay unique, so that a later join by row_id cannot multiply rows.
    places = zip(*(copies[name].to_pylist() for name in ("row_id", "origin", "position")), strict=True)
    new_ids = pa.array([f"{place[0]}{COPY_MARK}{hash_of(place)[:16]}" for place in places], pa.string())
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
