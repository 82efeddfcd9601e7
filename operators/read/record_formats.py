"""Reads JSON, JSONL and Parquet as a stream of records, and turns every defect of a file into a record of its own.

JSONL and Parquet are read by byte ranges, so that many tasks share one file. A JSON array cannot be entered in its
middle; one task streams it. Neither format is ever held in memory as a whole: a JSON record is at most
`MAX_RECORD_BYTES`, a Parquet batch `PARQUET_BATCH_ROWS` rows.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from operators.read.source_files import Piece, open_filesystem

MAX_RECORD_BYTES = 16 << 20
READ_BYTES = 1 << 20
PARQUET_BATCH_ROWS = 1024
RECORD_COLUMNS = ("instruction", "input", "output", "response", "messages")

_BOM = b"\xef\xbb\xbf"
_SURROGATES = re.compile("[\ud800-\udfff]")
_WHITESPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class Record(NamedTuple):
    """What a file holds at `position` (JSONL: byte offset; JSON, Parquet: index), or `reason` why it is no record.

    `raw` is the source text where there is one; with a reason it is what a person should see.
    """

    position: int
    value: object
    raw: str
    reason: str = ""


class _Binary(Protocol):
    def read(self, size: int, /) -> bytes: ...
    def readline(self, size: int, /) -> bytes: ...
    def seek(self, offset: int, /) -> int: ...


def read_records(piece: Piece, columns: tuple[str, ...] = RECORD_COLUMNS) -> Iterator[Record]:
    """All records of a piece, in the order of the file; of Parquet files only these columns.

    A file that is empty, absent, forbidden or no Parquet gives one record `unreadable_file`. Any other failure of
    the storage is raised: data that may be there on the next attempt must not be counted as bad.
    """
    if piece.end == 0 and piece.start == 0:
        yield Record(0, None, "the file is empty or not there", "unreadable_file")
        return
    filesystem, path = open_filesystem(piece.path)
    try:
        stream = filesystem.open_input_file(path)
    except (FileNotFoundError, PermissionError) as error:
        if piece.start == 0:
            yield Record(0, None, str(error), "unreadable_file")
        return
    with stream:
        suffix = path.rpartition(".")[2].lower()
        if suffix == "parquet":
            yield from _parquet_records(stream, piece, columns)
            return
        buffered: _Binary = io.BufferedReader(stream, READ_BYTES)
        if suffix == "jsonl" or _holds_lines(buffered):
            yield from _line_records(buffered, piece)
        else:
            yield from _array_records(buffered)


def without_surrogates(text: str) -> str:
    """`text` with U+FFFD for what UTF-8 cannot encode."""
    return _SURROGATES.sub("\ufffd", text)


def _line_records(stream: _Binary, piece: Piece) -> Iterator[Record]:
    position = piece.start
    stream.seek(max(position - 1, 0))
    if position > 0:  # the line that began before this piece belongs to the piece before
        position += _skip_line(stream) - 1
    while position < piece.end:
        line = stream.readline(MAX_RECORD_BYTES)
        if not line:
            return
        start, position = position, position + len(line)
        if len(line) == MAX_RECORD_BYTES and not line.endswith(b"\n"):
            position += _skip_line(stream)
            yield Record(start, None, line[:READ_BYTES].decode(errors="replace"), "too_long")
            continue
        line = (line.removeprefix(_BOM) if start == 0 else line).strip()
        if line:
            yield _parse_line(start, line)


def _skip_line(stream: _Binary) -> int:
    """Read to the next line's first byte; returns how many bytes that were."""
    skipped = 0
    while part := stream.readline(READ_BYTES):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _parse_line(position: int, line: bytes) -> Record:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return Record(position, None, line.decode(errors="replace"), "invalid_utf8")
    try:
        return Record(position, json.loads(text), text)
    except (ValueError, RecursionError):  # ValueError: also a number of thousands of digits
        return Record(position, None, text, "malformed_json")


def _holds_lines(stream: _Binary) -> bool:
    """Whether a .json file is JSONL by another name: its first line that is not blank is a whole object."""
    line = b"\n"
    while line.isspace():
        line = stream.readline(MAX_RECORD_BYTES).removeprefix(_BOM)
    stream.seek(0)
    return line.startswith(b"{") and isinstance(_parse_line(0, line.strip()).value, dict)


class _JsonText:
    """A window on the text of a stream; bytes that are not UTF-8 become lone surrogates, which no UTF-8 decodes to."""

    def __init__(self, stream: _Binary) -> None:
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape").decode
        self._window = ""
        self._place = 0
        self._ended = False
        self._grow()
        self._place = 1 if self._window.startswith("\ufeff") else 0

    def next_character(self) -> str:
        """The next character that is no white space, which stays unread; "" at the end."""
        while True:
            match = _WHITESPACE.match(self._window, self._place)
            assert match is not None, "an optional pattern always matches"  # noqa: S101
            self._place = match.end()
            if self._place < len(self._window):
                return self._window[self._place]
            if not self._grow():
                return ""

    def skip_character(self) -> None:
        self._place += 1

    def next_value(self) -> tuple[object, str]:
        """The next JSON value and its text; ValueError or RecursionError if there is none within `MAX_RECORD_BYTES`."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._window, self._place)
            except ValueError:
                if len(self._window) - self._place > MAX_RECORD_BYTES or not self._grow():
                    raise
                continue
            # A number can go on in the part that is not read yet.
            if end < len(self._window) or not self._grow():
                text = self._window[self._place : end]
                self._place = end
                return value, text

    def rest(self) -> str:
        return self._window[self._place : self._place + READ_BYTES]

    def _grow(self) -> bool:
        """Drop what was read and add at least as much as is left, so that a long value costs linear time."""
        if self._ended:
            return False
        kept = self._window[self._place :]
        data = self._stream.read(max(READ_BYTES, len(kept)))
        self._ended = not data
        self._window, self._place = kept + self._decode(data, final=self._ended), 0
        return True


def _array_records(stream: _Binary) -> Iterator[Record]:
    """The elements of one JSON array, or objects that follow each other; a break ends it with one malformed record."""
    text = _JsonText(stream)
    is_array = text.next_character() == "["
    if is_array:
        text.skip_character()
    position = 0
    while character := text.next_character():
        if is_array and character == "]":
            text.skip_character()
            is_array = False
            if not text.next_character():
                return
            break
        try:
            value, raw = text.next_value()
        except (ValueError, RecursionError):
            break
        broken = _SURROGATES.search(raw) is not None
        yield Record(position, value, without_surrogates(raw) if broken else raw, "invalid_utf8" if broken else "")
        position += 1
        separator = text.next_character()
        if is_array and separator == ",":
            text.skip_character()
        elif is_array and separator != "]":
            break
    else:
        if not is_array:
            return
    yield Record(position, None, without_surrogates(text.rest()) or "the array has no end", "malformed_json")


def _parquet_records(stream: pafs.FileSystem, piece: Piece, wanted: tuple[str, ...]) -> Iterator[Record]:
    try:
        file = pq.ParquetFile(stream)
    except (pa.ArrowException, OSError) as error:
        if piece.start == 0:
            yield Record(0, None, str(error), "unreadable_file")
        return
    columns = [name for name in file.schema_arrow.names if name in wanted]
    position = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if piece.start <= _first_byte(file.metadata.row_group(group)) < piece.end:
            done = 0
            try:
                for batch in file.iter_batches(PARQUET_BATCH_ROWS, row_groups=[group], columns=columns):
                    for value in _rows(batch):
                        yield value._replace(position=position + done)
                        done += 1
            except (pa.ArrowException, OSError) as error:
                lost = f"row group {group}: {rows - done} of {rows} rows: {error}"  # a count that may be corrupt too
                yield Record(position + done, None, lost, "unreadable_file")
        position += rows


def _first_byte(group: pq.RowGroupMetaData) -> int:
    if group.num_columns == 0:
        return 0
    column = group.column(0)
    return int(column.dictionary_page_offset or column.data_page_offset)


def _rows(batch: pa.RecordBatch) -> Iterator[Record]:
    try:
        values = batch.to_pylist()
    except UnicodeDecodeError:  # some string of the batch; find out which row's
        for index in range(batch.num_rows):
            try:
                yield Record(0, batch.slice(index, 1).to_pylist()[0], "")
            except UnicodeDecodeError as error:
                yield Record(0, None, bytes(error.object).decode(errors="replace"), "invalid_utf8")
        return
    for value in values:
        yield Record(0, value, "")
