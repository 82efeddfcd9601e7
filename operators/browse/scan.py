"""Reads pages of rows from Parquet files of any size: a request reads what it shows, and keeps nothing in memory.

A page begins at a cursor (file and row) and ends when it is full, the files end, or its time is over. Filters read
only the columns that they need; the columns to show are read only from row groups with matching rows.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

BATCH_ROWS = 4096
MOST_SECONDS = 3.0  # of one request; a longer search continues on the next page
KIND_END = ":"  # a wanted outcome that ends with this matches all reasons, such as "quarantined:"


@dataclass(frozen=True)
class Cursor:
    """Where a page begins: the name of the file, and the number of the row in it.

    The file is given by name, not by number: new files may come while a person reads, and no page may repeat or skip.
    """

    file: str = ""
    row: int = 0

    @classmethod
    def parse(cls, text: str) -> "Cursor":
        """Parse what `str` gives; any other text means the beginning."""
        row, _, file = text.partition("-")
        return cls(file, int(row)) if row.isdecimal() and row.isascii() and file else cls()

    def __str__(self) -> str:
        return f"{self.row}-{self.file}"


@dataclass(frozen=True)
class Wanted:
    """Which rows to show.

    Attributes:
        equal: column -> the value it must have, or a set of values of which it must have one; a value that ends with
            ":" is a prefix.
        filled: columns that must not be empty.
        text: must occur in one of the columns `searched`, ignoring case; "" matches every row.
        searched: columns in which to look for `text`.
        also: a second text and the columns of which one must contain it.
        groups: row groups of each file to look at, the first and the one after the last; None: all.
    """

    equal: Mapping[str, str | frozenset[str]] = field(default_factory=dict)
    filled: Sequence[str] = ()
    text: str = ""
    searched: Sequence[str] = ()
    also: tuple[str, Sequence[str]] = ("", ())
    groups: tuple[int, int] | None = None

    def columns(self) -> list[str]:
        """The columns that a filter has to read."""
        searched = [name for _, names in self.searches() for name in names]
        return list(dict.fromkeys([*self.equal, *self.filled, *searched]))

    def searches(self) -> list[tuple[str, Sequence[str]]]:
        """The texts to look for, each with its columns."""
        return [(text, names) for text, names in ((self.text, self.searched), self.also) if text]


@dataclass(frozen=True)
class Page:
    """Rows that were wanted, and where the next page begins.

    Attributes:
        rows: in the order of the files.
        following: where the next page begins; None if there is none.
        looked_at: number of rows that were compared with the filter.
        out_of_time: whether the page ended because its time was over.
    """

    rows: list[dict[str, Any]]
    following: Cursor | None
    looked_at: int
    out_of_time: bool = False


def read_page(
    filesystem: fs.FileSystem,
    files: Sequence[str],
    columns: Sequence[str],
    wanted: Wanted,
    start: Cursor,
    limit: int,
    *,
    seconds: float = MOST_SECONDS,
) -> Page:
    """The next `limit` wanted rows from `start` on.

    Args:
        filesystem: of the files.
        files: paths of Parquet files, sorted.
        columns: to show; those that a file does not have are left out of its rows.
        wanted: which rows.
        start: where to begin.
        limit: largest number of rows of the page.
        seconds: after this time the page ends even if it is not full.
    """
    deadline = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    looked_at = 0
    for path in files:
        name = path.rpartition("/")[2]
        if name < start.file:
            continue
        first = start.row if name == start.file else 0
        with filesystem.open_input_file(path) as stream:
            file = pq.ParquetFile(stream)
            for group, offset in _row_groups(file, first, wanted.groups):
                found, seen = _wanted_rows(file, group, max(0, first - offset), wanted, limit - len(rows), deadline)
                rows += _take(file, group, found, columns)
                looked_at += seen
                reached = offset + max(0, first - offset) + seen
                if len(rows) >= limit or time.monotonic() > deadline:
                    following = Cursor(name, reached)
                    return Page(rows, following, looked_at, out_of_time=len(rows) < limit)
    return Page(rows, None, looked_at)


def _row_groups(file: pq.ParquetFile, first: int, wanted: tuple[int, int] | None) -> Iterator[tuple[int, int]]:
    """Row groups to look at that hold a row from `first` on, each with the number of its first row."""
    offset = 0
    begin, end = wanted or (0, file.num_row_groups)
    for group in range(end):
        size = file.metadata.row_group(group).num_rows
        if group >= begin and offset + size > first:
            yield group, offset
        offset += size


def _wanted_rows(
    file: pq.ParquetFile, group: int, skip: int, wanted: Wanted, limit: int, deadline: float
) -> tuple[list[int], int]:
    """Indices of wanted rows within the row group, from `skip` on, and the number of rows compared."""
    columns = [name for name in wanted.columns() if name in file.schema_arrow.names]
    size = file.metadata.row_group(group).num_rows
    if not columns:
        places = range(skip, min(size, skip + limit)) if not wanted.columns() else range(0)
        return list(places), len(places) if places else size - skip
    found: list[int] = []
    offset = 0
    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
        if offset + batch.num_rows > skip:
            here = [offset + place for place in _matches(batch, wanted) if offset + place >= skip]
            if len(found) + len(here) >= limit:
                found += here[: limit - len(found)]
                return found, found[-1] + 1 - skip
            found += here
        offset += batch.num_rows
        if time.monotonic() > deadline:
            break
    return found, max(0, offset - skip)


def _matches(batch: pa.RecordBatch, wanted: Wanted) -> list[int]:
    mask = pa.array([True] * batch.num_rows)
    for name in (*wanted.equal, *wanted.filled):
        if name not in batch.schema.names:
            return []
        mask = pc.and_(mask, _fits(pc.fill_null(batch[name], ""), wanted.equal.get(name)))
    for text, names in wanted.searches():
        anywhere = pa.array([False] * batch.num_rows)
        for name in names:
            if name in batch.schema.names:
                hit = pc.match_substring(batch[name], text, ignore_case=True)
                anywhere = pc.or_(anywhere, pc.fill_null(hit, False))
        mask = pc.and_(mask, anywhere)
    places: list[int] = pc.indices_nonzero(mask).to_pylist()
    return places


def _fits(column: pa.Array, value: str | frozenset[str] | None) -> pa.BooleanArray:
    if value is None:
        return pc.not_equal(column, "")
    if isinstance(value, frozenset):
        return pc.is_in(column, pa.array(sorted(value), pa.string()))
    return pc.starts_with(column, value) if value.endswith(KIND_END) else pc.equal(column, value)


def _take(file: pq.ParquetFile, group: int, places: list[int], columns: Sequence[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    known = [name for name in columns if name in file.schema_arrow.names]
    offset, at = 0, 0
    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=known) if places else ():
        here = []
        while at < len(places) and places[at] < offset + batch.num_rows:
            here.append(places[at] - offset)
            at += 1
        rows += batch.take(pa.array(here, pa.int64())).to_pylist()
        offset += batch.num_rows
        if at == len(places):
            break
    return rows
