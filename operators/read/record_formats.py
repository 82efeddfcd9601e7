"""Reads a piece of a file of any format as a stream of records; every defect of a file is a record of its own."""

import sys
from collections.abc import Callable, Iterator

from pyarrow import fs

from operators.files.atomic import open_filesystem
from operators.read.json_records import line_records, value_records
from operators.read.message_tables import assembled
from operators.read.record import READ_BYTES, Record
from operators.read.source_files import Piece
from operators.read.table_records import arrow_records, delimited_records, parquet_records
from operators.read.text_streams import format_of, holds_lines, is_damaged, open_text
from operators.redact import without_credentials

__all__ = ["Record", "read_records"]


def read_records(piece: Piece, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[Record]:
    """All records of a piece, in the order of the file; a tree of a table of messages is one record.

    A file that is empty, damaged or not what its name says gives one record `unreadable_file`. If a file is absent or
    forbidden, or the storage fails, an error is raised: data that may be readable on the next attempt must not count
    as bad, and its file must not count as read.

    Args:
        piece: as of `plan_pieces`.
        wanted: whether to read a column of this name; only readers of Parquet and Arrow files skip the others.
    """
    if piece.end == 0 and piece.start == 0:
        filesystem, path = open_filesystem(piece.path)
        if filesystem.get_file_info(path).type == fs.FileType.NotFound:
            raise FileNotFoundError(f"{piece.path} went away while it was to be read")
        yield Record(0, None, "the file is empty", "unreadable_file")
        return
    found = False
    try:
        for record in assembled(_read(piece, wanted)):
            found = True
            yield record
        if not found and _is_whole(piece):
            yield Record(0, None, "the file holds no record", "unreadable_file")
    except OSError as error:
        if isinstance(error, FileNotFoundError | PermissionError) or not is_damaged(error):
            raise
        yield Record(piece.end, None, without_credentials(f"the rest of the file: {error}"), "unreadable_file")


def _is_whole(piece: Piece) -> bool:
    filesystem, path = open_filesystem(piece.path)
    return piece.start == 0 and piece.end >= (filesystem.get_file_info(path).size or 0)


def _read(piece: Piece, wanted: Callable[[str], bool]) -> Iterator[Record]:
    filesystem, path = open_filesystem(piece.path)
    kind, _ = format_of(path)
    if kind in ("parquet", "arrow"):
        with filesystem.open_input_file(path) as file:
            if kind == "parquet":
                yield from parquet_records(file, piece.start, piece.end, wanted)
            else:
                yield from arrow_records(file, wanted)
        return
    stream, is_plain = open_text(filesystem, path, max(piece.start - 1, 0))
    with stream:
        if kind in ("csv", "tsv"):
            yield from delimited_records(stream, kind)
        elif piece.start > 0 or holds_lines(stream.peek(READ_BYTES), kind):
            yield from line_records(stream, piece.start, piece.end if is_plain else sys.maxsize)
        else:
            yield from value_records(stream)
