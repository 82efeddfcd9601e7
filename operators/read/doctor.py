"""Checks the first records of the source before any paid call: whether they can be used, and what is not read."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

from operators.columns import ACTIVE, RAW
from operators.files.atomic import open_filesystem
from operators.read.config import ReadConfig
from operators.read.nested_columns import paths_below
from operators.read.read_instructions import raw_rows
from operators.read.read_record import extract
from operators.read.reasons import told
from operators.read.record import Record
from operators.read.record_fields import missing_fields
from operators.read.record_formats import read_records
from operators.read.source_files import Piece, shown
from operators.stage import Finding

FILES, RECORDS = 8, 20  # most files, and records of each, that the check reads
MOST_NAMED = 12  # columns in one message


def examine_source(config: ReadConfig, files: Sequence[str]) -> list[Finding]:
    """What is wrong with the first records of the first files.

    A file without a usable record gives a warning that names the missing field and the columns that are there. It is
    fatal if no file has a usable record. Columns that are not empty and not read give a warning.

    Args:
        config: how the source is read.
        files: paths or URIs, as of `list_source_files`.
    """
    found: list[Finding] = []
    unread: Counter[str] = Counter()
    num_unusable = 0
    for path in files[:FILES]:
        records = _first_records(path)
        pairs = [(record, extract(record, config)) for record in records]
        unread.update(name for _, each in pairs for name in each.unread)
        if records and all(each.exchanges[-1].reason for _, each in pairs):
            num_unusable += 1
            reasons = Counter(each.exchanges[-1].reason for _, each in pairs)
            found.append(Finding("source.path", _why(path, records, reasons, config), fatal=False))
    if found and num_unusable == len(files[:FILES]):
        return [Finding(each.key, each.text) for each in found]
    if unread:
        text = f"columns that hold something and are not read: {_named(unread)}; keep them by source.pass_through"
        found.append(Finding("source.columns", text, fatal=False))
    return found


def first_rows(config: ReadConfig, files: Sequence[str]) -> list[dict[str, Any]]:
    """The active rows of the first records of the first file that has any, with the columns of columns.RAW."""
    for path in files[:FILES]:
        piece = Piece(0, path, 0, 0)
        rows = [row for record in _first_records(path) for row in raw_rows(piece, record, config, frozenset())]
        named = [dict(zip(RAW.names, row, strict=False)) for row in rows]
        if active := [row for row in named if row["outcome"] == ACTIVE]:
            return active
    return []


def _first_records(path: str) -> list[Record]:
    filesystem, inside = open_filesystem(path)
    size = filesystem.get_file_info(inside).size or 0
    return list(itertools.islice(read_records(Piece(0, path, 0, size)), RECORDS))


def _why(path: str, records: Sequence[Record], reasons: Counter[str], config: ReadConfig) -> str:
    text = f"{shown(path)}: none of the first {len(records)} records can be used: {told(reasons)}"
    objects = [record.value for record in records if isinstance(record.value, dict)]
    if not objects or not {"missing_field", "non_string_field"} & reasons.keys():
        return text
    missing = dict.fromkeys(field for value in objects for field in missing_fields(value, config.columns))
    columns = dict.fromkeys(name for value in objects for name in paths_below(value))
    if not missing:
        return f"{text}; the columns are {_named(columns)}"
    return (
        f"{text}; missing: {', '.join(missing)}; the columns are {_named(columns)}; "
        f"say which is which by source.columns={{{next(iter(missing), 'response')}: <column>}}"
    )


def _named(names: Counter[str] | dict[str, None]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(list(names)[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
