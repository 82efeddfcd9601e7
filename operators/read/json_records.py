"""Reads JSON as a stream of records: one record per line, an array, an object around an array, or value after value.

Files of lines are read by byte ranges, so that many tasks share one file; a broken line costs one record. Reading
cannot start in the middle of the other forms: one task streams the file, and stops at the first error. No file is held
in memory as a whole: a record has at most `MAX_RECORD_BYTES`.
"""

import codecs
import json
import re
from collections.abc import Iterator

from operators.outside_text import replace_surrogates
from operators.read.record import MAX_RECORD_BYTES, READ_BYTES, Record, distinct
from operators.read.text_streams import BOM, Binary, wrapped_records

_SURROGATES = re.compile("[\ud800-\udfff]")
_WHITESPACE = re.compile(r"[ \t\n\r]*")
_KEY = re.compile(r'\s*("(?:[^"\\]|\\.)*")\s*:')


def _object_of(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; if a key occurs twice, the second value is kept under another name."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    return dict(zip(distinct([key for key, _ in pairs]), (value for _, value in pairs), strict=True))


_DECODER = json.JSONDecoder(object_pairs_hook=_object_of)


def line_records(stream: Binary, start: int, end: int) -> Iterator[Record]:
    """The records of the lines that begin in the bytes [start, end).

    Args:
        stream: positioned at byte `start` - 1, or at 0 if `start` is 0.
        start: first byte of the piece.
        end: one past its last byte.
    """
    position = start
    if position > 0:  # the line that began before this piece belongs to the piece before
        position += _skip_line(stream) - 1
    while position < end:
        line = stream.readline(MAX_RECORD_BYTES)
        if not line:
            return
        begin, position = position, position + len(line)
        if len(line) == MAX_RECORD_BYTES and not line.endswith(b"\n"):
            position += _skip_line(stream)
            yield Record(begin, None, line[:READ_BYTES].decode(errors="replace"), "too_long")
            continue
        line = (line.removeprefix(BOM) if begin == 0 else line).strip()
        if line:
            yield _parse_line(begin, line)


def value_records(stream: Binary) -> Iterator[Record]:
    """The elements of one JSON array, or values that follow each other; a syntax error gives one last, bad record."""
    text = _JsonText(stream)
    is_wrapped = text.enter_wrapper()
    is_array = is_wrapped or text.next_character() == "["
    if is_array and not is_wrapped:
        text.skip_character()
    position = 0
    while character := text.next_character():
        if is_array and character == "]":
            text.skip_character()
            if is_wrapped:
                yield from _other_keys(text, position)
                return
            is_array = False
            if not text.next_character():
                return
            break
        try:
            value, raw = text.next_value()
        except (ValueError, RecursionError):
            break
        broken = _SURROGATES.search(raw) is not None
        yield Record(position, value, replace_surrogates(raw) if broken else raw, "invalid_utf8" if broken else "")
        position += 1
        separator = text.next_character()
        if is_array and separator == ",":
            text.skip_character()
        elif is_array and separator != "]":
            break
    else:
        if not is_array:
            return
    yield _broken(text, position)


def _other_keys(text: "_JsonText", position: int) -> Iterator[Record]:
    """Bad records for further lists of records behind the first one in an object: they are named, not read."""
    while text.next_character() == ",":
        text.skip_character()
        try:
            key = text.next_value()[0]
            if text.next_character() != ":":
                break
            text.skip_character()
            value = text.next_value()[0]
        except (ValueError, RecursionError):
            break
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            yield Record(position, None, f"{key}: {len(value)} records in a second list of the file", "second_list")
            position += 1
    if text.next_character() == "}":
        text.skip_character()
        if not text.next_character():
            return
    yield _broken(text, position)


def _broken(text: "_JsonText", position: int) -> Record:
    reason = "rest_malformed" if position else "malformed_json"
    return Record(position, None, replace_surrogates(text.rest()) or "the array has no end", reason)


def _skip_line(stream: Binary) -> int:
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
        return Record(position, _DECODER.decode(text), text)
    except (ValueError, RecursionError):  # ValueError: also a number of thousands of digits
        return Record(position, None, text, "malformed_json")


class _JsonText:
    """A window on the text of a stream; invalid bytes become lone surrogates, which valid UTF-8 never gives."""

    def __init__(self, stream: Binary) -> None:
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape").decode
        self._window = ""
        self._place = 0
        self._ended = False
        self._grow()
        self._place = 1 if self._window.startswith("\ufeff") else 0

    def enter_wrapper(self) -> bool:
        """Go to the first record of an object that wraps a list of records; False if this is not such an object."""
        self.next_character()
        self._window, self._place = self._window[self._place :], 0
        place = wrapped_records(self._window)
        self._place = place or 0
        return place is not None

    def next_character(self) -> str:
        """The next character that is not white space, without consuming it; "" at the end."""
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
        self.next_character()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._window, self._place)
            except ValueError:
                if len(self._window) - self._place > MAX_RECORD_BYTES or not self._grow():
                    raise
                continue
            # A number may continue in the part that is not read yet.
            if end < len(self._window) or not self._grow():
                text = self._window[self._place : end]
                self._place = end
                return value, text

    def rest(self) -> str:
        return self._window[self._place : self._place + READ_BYTES]

    def _grow(self) -> bool:
        """Drop the consumed text and read at least as much as is left, so that a long value costs linear time."""
        if self._ended:
            return False
        kept = self._window[self._place :]
        data = self._stream.read(max(READ_BYTES, len(kept)))
        self._ended = not data
        self._window, self._place = kept + self._decode(data, final=self._ended), 0
        return True
