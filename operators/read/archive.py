"""Keeps the rows of source files that can no longer be read: rows that an earlier run stored are their archive."""

import json
from collections.abc import Collection
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Dataset

from operators.chat_markup import escape
from operators.columns import ACTIVE, HELD_OUT, QUARANTINED, RAW, conform
from operators.join import ROWS_PER_PARTITION, cogroup, group_by_key
from operators.read.config import ReadConfig
from operators.read.dialogues import Turn, as_json
from operators.read.read_instructions import COPY_MARK, DUPLICATE, is_held_out
from operators.read.read_record import row_id_of

TEXTS, TURNS = ("instruction", "input", "response"), ("turns_before", "turns_after")
FAILED = "_failed"  # suffix of the reason of a row on which a custom step raised an error; its texts are usable
PLACE = "place"  # column with the earlier id of a copy, which depends on its place in the source
_RENEWED = pa.schema([*RAW, pa.field(PLACE, pa.string())])


def rows_of_files(stored: Dataset, names: Collection[str], all_names: Collection[str]) -> Dataset:
    """The stored rows whose file is one of `names`.

    Args:
        stored: columns.RAW.
        names: files, relative to the source of that time.
        all_names: names of all files that were read. A row belongs to the longest name that its origin ends with.
    """
    pick = partial(_of_files, names=frozenset(names), all_names=frozenset(all_names))
    return stored.map_batches(pick, batch_format="pyarrow", num_cpus=0.25)


def with_archive(rows: Dataset, archived: Dataset, config: ReadConfig, special_tokens: frozenset[str]) -> Dataset:
    """The rows that were read, and each archived row whose record is not among them.

    An archived row that was dropped gets a new outcome, because the row that it repeated may be gone. One that was
    quarantined stays so, unless a custom step failed on it. Custom steps get the archived rows again, as stored.

    Args:
        rows: columns.RAW as of `read_instructions`.
        archived: columns.RAW as they were stored; ids are unique.
        config: how records are read; decides what is held out.
        special_tokens: of teacher and student; they may differ from those when the rows were stored.

    Columns out:
        columns.RAW; ids are unique.
    """
    renew = partial(_renewed, config=config, special_tokens=special_tokens)
    renewed = archived.map_batches(renew, batch_format="pyarrow", num_cpus=0.25)
    num_blocks = 1 + (rows.count() + archived.count()) // ROWS_PER_PARTITION
    joined = cogroup((rows, RAW), (renewed, _RENEWED), "row_id", num_blocks, _join)
    # A changed file may hold a copy at the same place as its archive does.
    return group_by_key(joined, "row_id", num_blocks).map_batches(
        _once, batch_size=None, batch_format="pyarrow", num_cpus=0.25
    )


def _of_files(rows: pa.Table, names: frozenset[str], all_names: frozenset[str]) -> pa.Table:
    wanted = [origin for origin in rows["origin"].unique().to_pylist() if _name_of(origin, all_names) in names]
    return rows.filter(pc.is_in(rows["origin"], pa.array(wanted, pa.string())))


def _name_of(origin: str, names: frozenset[str]) -> str:
    """The longest of `names` that the path `origin` ends with; "" if there is none."""
    parts = origin.split("/")
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((end for end in ends if end in names), "")


def _renewed(rows: pa.Table, config: ReadConfig, special_tokens: frozenset[str]) -> pa.Table:
    """The rows as they were just after reading; a copy gets the id of its texts, as if it were the first."""
    records = rows.select(RAW.names).to_pylist()
    for row in records:
        outcome = row["outcome"]
        if outcome.startswith(QUARANTINED) and not outcome.endswith(FAILED):
            continue
        if outcome == DUPLICATE:
            row[PLACE] = row["row_id"]
            row["row_id"] = _id_of_first(row)
        safe = {name: escape(row[name], special_tokens) for name in TEXTS}
        safe |= {name: _escaped_turns(row[name], special_tokens) for name in TURNS}
        row["escaped"] = row["escaped"] or any(row[name] != text for name, text in safe.items())
        row |= safe
        alone = not row["turns_before"] and not row["turns_after"]  # dialogues are held out as a whole
        held_out = outcome == HELD_OUT or (alone and is_held_out(row["row_id"], config))
        row["outcome"] = HELD_OUT if held_out else ACTIVE
    return pa.Table.from_pylist(records, schema=_RENEWED)


def _id_of_first(copy: dict[str, Any]) -> str:
    """The id of the first of a copy. Older versions did not store it; then it is computed from the stored texts."""
    first, mark, _ = copy["row_id"].rpartition(COPY_MARK)
    return first if mark else row_id_of(*(copy[name] for name in (*TEXTS, *TURNS)))


def _escaped_turns(turns: str, special_tokens: frozenset[str]) -> str:
    if not turns:
        return ""
    listed = (Turn(turn["role"], turn["content"] or "") for turn in json.loads(turns))
    return as_json(turn._replace(content=escape(turn.content, special_tokens)) for turn in listed)


def _join(rows: pa.Table, archived: pa.Table) -> pa.Table:
    """For each id, keep the row that was read, else the archived one, else the first copy; other copies stay copies."""
    is_copy = pc.is_valid(archived[PLACE])
    ids = set(rows["row_id"].to_pylist())
    kept = [row for row in archived.filter(pc.invert(is_copy)).to_pylist() if row["row_id"] not in ids]
    known = ids | {row["row_id"] for row in kept}
    for copy in archived.filter(is_copy).sort_by([("origin", "ascending"), (PLACE, "ascending")]).to_pylist():
        first = copy["row_id"] not in known
        known.add(copy["row_id"])
        kept.append(copy | ({} if first else {"row_id": copy[PLACE], "outcome": DUPLICATE}))
    return pa.concat_tables([rows, pa.Table.from_pylist(kept, schema=_RENEWED).select(RAW.names)])


def _once(rows: pa.Table) -> pa.Table:
    """The first row of each id."""
    if not rows.num_rows:  # the shuffle may give a block no columns at all
        return RAW.empty_table()
    places = dict[str, int]()
    for place, row_id in enumerate(rows["row_id"].to_pylist()):
        places.setdefault(row_id, place)
    return conform(rows.take(pa.array(list(places.values()), pa.int64())), RAW)
