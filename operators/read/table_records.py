"""Reads tables as a stream of records: CSV and TSV by Python's reader, Parquet and Arrow files batch by batch.

Parquet is read by row groups, so that many tasks share one file. Only the columns that can be used are read; the file's
statistics tell which of the others are not empty. Of two columns of the same name the first keeps it.
"""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from operators.outside_text import replace_surrogates
from operators.read.nested_columns import class_labels, with_labels
from operators.read.record import MAX_RECORD_BYTES, READ_BYTES, Record, distinct

BATCH_ROWS = 1024
DELIMITERS = ",;\t|"
UNCLOSED = "unexpected end of data"  # csv's words at the end of a file inside a quoted field

Wanted = Callable[[str], bool]


def delimited_records(stream: io.BufferedReader, kind: str) -> Iterator[Record]:
    """The rows of a CSV or TSV file as dicts of strings; a row with more or fewer fields than the header is malformed.

    So is a row with text between a closing quote and the delimiter: a lenient reader takes the rows up to the next
    quote for one text. Reading goes on in the next line, unless the header is malformed or nothing closes the quote.

    Args:
        stream: UTF-8 text.
        kind: `tsv`, or `csv`, whose delimiter is the most frequent one of `DELIMITERS` in its header.
    """
    head = stream.peek(READ_BYTES).decode("utf-8-sig", errors="replace").partition("\n")[0]
    delimiter = "\t" if kind == "tsv" else max(DELIMITERS, key=head.count)
    csv.field_size_limit(MAX_RECORD_BYTES)
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    header: Sequence[str] | None = None
    position = 0
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    while True:
        begin = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            is_last = header is None or str(error) == UNCLOSED
            lines = f"line {begin}" if begin == rows.line_num else f"lines {begin} to {rows.line_num}"
            yield Record(position, None, f"{lines}: {error}", "rest_malformed" if is_last else "malformed_csv")
            if is_last:
                return
            position += 1
            continue
        if not row:  # a blank line
            continue
        if header is None:
            header = distinct(row)
            continue
        raw = delimiter.join(row)
        readable = replace_surrogates(raw)
        if readable != raw:
            yield Record(position, None, readable, "invalid_utf8")
        elif len(row) != len(header):
            yield Record(position, None, raw, "malformed_csv")
        else:
            yield Record(position, dict(zip(header, row, strict=True)), "")
        position += 1


def arrow_records(stream: Any, wanted: Wanted) -> Iterator[Record]:
    """The rows of an Arrow file or stream, such as `datasets` saves to disk."""
    try:
        batches, schema = _arrow_batches(stream)
    except (pa.ArrowException, OSError) as error:
        yield Record(0, None, str(error), "unreadable_file")
        return
    names = distinct(schema.names)
    columns = [name for name in names if wanted(name)]
    labels = class_labels(schema)
    position = 0
    try:
        for unnamed in batches:
            batch = unnamed.rename_columns(names)
            unread = tuple(name for name in names if not wanted(name) and batch[name].null_count < batch.num_rows)
            for start in range(0, batch.num_rows, BATCH_ROWS):
                for record in _rows(batch.select(columns).slice(start, BATCH_ROWS), labels):
                    yield record._replace(position=position, unread=unread)
                    position += 1
    except (pa.ArrowException, OSError) as error:
        yield Record(position, None, f"the rows from {position} on: {error}", "unreadable_file")


def parquet_records(stream: Any, start: int, end: int, wanted: Wanted) -> Iterator[Record]:
    """The rows of the row groups whose first byte lies in [start, end)."""
    try:
        file = pq.ParquetFile(stream)
    except (pa.ArrowException, OSError) as error:
        if start == 0:
            yield Record(0, None, str(error), "unreadable_file")
        return
    columns = [name for name in file.schema_arrow.names if wanted(name)]
    labels = class_labels(file.schema_arrow)
    position = 0
    for group in range(file.num_row_groups):
        metadata = file.metadata.row_group(group)
        rows = metadata.num_rows
        if start <= _first_byte(metadata) < end:
            unread = _unread_columns(metadata, wanted)
            done = 0
            try:
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
                    for value in _rows(batch.rename_columns(distinct(batch.schema.names)), labels):
                        yield value._replace(position=position + done, unread=unread)
                        done += 1
            except (pa.ArrowException, OSError) as error:
                lost = f"row group {group}: {rows - done} of {rows} rows: {error}"  # a count that may be corrupt too
                yield Record(position + done, None, lost, "unreadable_file")
        position += rows


def _arrow_batches(stream: Any) -> tuple[Iterator[pa.RecordBatch], pa.Schema]:
    try:
        file = pa.ipc.open_file(stream)
        return (file.get_batch(index) for index in range(file.num_record_batches)), file.schema
    except pa.ArrowInvalid:
        stream.seek(0)
        opened = pa.ipc.open_stream(stream)
        return iter(opened), opened.schema


def _unread_columns(group: pq.RowGroupMetaData, wanted: Wanted) -> tuple[str, ...]:
    """Columns that are not wanted and not empty, as far as the statistics of the row group tell."""
    names: dict[str, None] = {}
    for number in range(group.num_columns):
        column = group.column(number)
        name = column.path_in_schema.partition(".")[0]
        if not wanted(name) and not _is_empty(column):
            names[name] = None
    return tuple(names)


def _is_empty(column: pq.ColumnChunkMetaData) -> bool:
    statistics = column.statistics
    if statistics is None:
        return False
    if statistics.has_null_count and statistics.null_count == column.num_values:
        return True
    try:
        return bool(statistics.has_min_max and statistics.min == statistics.max == "")
    except (UnicodeDecodeError, pa.ArrowException):  # a text that is not UTF-8, a type without a Python value
        return False


def _first_byte(group: pq.RowGroupMetaData) -> int:
    if group.num_columns == 0:
        return 0
    column = group.column(0)
    return int(column.dictionary_page_offset or column.data_page_offset)


def _rows(batch: pa.RecordBatch, labels: Mapping[str, list[str]]) -> Iterator[Record]:
    try:
        values = batch.to_pylist()
    except UnicodeDecodeError:  # in some string of the batch; find out in which row
        for index in range(batch.num_rows):
            try:
                yield Record(0, with_labels(batch.slice(index, 1).to_pylist()[0], labels), "")
            except UnicodeDecodeError as error:
                yield Record(0, None, bytes(error.object).decode(errors="replace"), "invalid_utf8")
        return
    for value in values:
        yield Record(0, with_labels(value, labels), "")
