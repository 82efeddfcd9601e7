"""Opens text files as UTF-8, decompressed, and tells whether they can be read line by line."""

import codecs
import io
import json
import re
from typing import Any, Protocol

import pyarrow as pa
from pyarrow import fs

from operators.read.record import READ_BYTES

BOM = b"\xef\xbb\xbf"
CODECS = {"gz": "gzip", "zst": "zstd", "bz2": "bz2"}  # by the last part of a file's name
LINES = ("jsonl", "ndjson")
# Keys of the list of records in a file that is one JSON object.
WRAPPERS = frozenset(
    ("data", "rows", "records", "examples", "instances", "items", "samples", "entries", "train", "instructions")
)

_KEY = re.compile(r'\s*,?\s*("(?:[^"\\]|\\.)*")\s*:\s*')
_LIST = re.compile(r"\[\s*(?=[{\[\]]|$)")
_DECODER = json.JSONDecoder()


class Binary(Protocol):
    """The part of a binary stream that readers use."""

    def read(self, size: int = ..., /) -> bytes:
        """The next bytes, at most `size`; none at the end."""

    def readline(self, size: int = ..., /) -> bytes:
        """The bytes up to and including the next line feed, at most `size`."""


def format_of(path: str) -> tuple[str, str | None]:
    """The format that a file's name tells, in lower case, and its compression or None: `a.JSONL.gz` is jsonl, gzip."""
    *_, before, last = ["", "", *path.rpartition("/")[2].lower().split(".")]
    return (before, CODECS[last]) if last in CODECS else (last, None)


def open_text(filesystem: fs.FileSystem, path: str, start: int = 0) -> tuple[io.BufferedReader, bool]:
    """A stream of the file's text as UTF-8, from byte `start` on, and whether its bytes are those of the file.

    If they are not, the file was decompressed or transcoded from UTF-16, and must be read from its start to its end.
    Bytes that are not UTF-8 stay unchanged. Half a character of UTF-16 becomes U+FFFD.

    Raises:
        OSError: from the file system; while reading, also if the compressed data is damaged (`is_damaged`).
    """
    compression = format_of(path)[1]
    stream: Any = filesystem.open_input_file(path)
    if compression is not None:
        stream = pa.CompressedInputStream(stream, compression)
    elif start:
        stream.seek(start)
    opened = io.BufferedReader(stream, READ_BYTES)
    encoding = None if start else _utf16(opened.peek(4)[:4])
    if encoding is None:
        return opened, compression is None
    return io.BufferedReader(_Transcoded(opened, encoding), READ_BYTES), False


def is_damaged(error: OSError) -> bool:
    """Whether reading failed because compressed data is damaged or cut off, not because the storage failed."""
    return re.search(r"zlib|zstd|bz2|inflate|decompress|compressed stream", str(error), re.IGNORECASE) is not None


def holds_lines(head: bytes, kind: str) -> bool:
    """Whether a JSON file has one record per line: it can be cut between lines, and a broken line costs one record.

    Args:
        head: the first bytes of its text, at most `READ_BYTES`.
        kind: from `format_of`; decides if the text does not.
    """
    if _utf16(head):
        return False
    text = head.removeprefix(BOM).decode(errors="replace").lstrip()
    first, _, rest = text.partition("\n")
    first = first.strip()
    if first.startswith("["):  # one array, or an array per line
        return bool(rest.strip()) and _is_whole(first)
    if first.startswith("{") and rest.strip() and _is_whole(first):  # also if a list in it has the name of a wrapper's
        return True
    if first == "{" or wrapped_records(text) is not None:
        return False
    return kind in LINES or (first.startswith("{") and _is_whole(first))


def wrapped_records(text: str) -> int | None:
    """The place where the records begin in a JSON object such as {"version": 1, "data": [...]}.

    Args:
        text: begins with the object; may end anywhere.

    Returns:
        The index after the list's bracket; None if this is not such an object.
    """
    place = 1
    while text.startswith("{") and (match := _KEY.match(text, place)):
        place = match.end()
        if json.loads(match[1], strict=False).casefold() in WRAPPERS and (opening := _LIST.match(text, place)):
            return opening.end()
        try:
            value, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError):
            return None
        if isinstance(value, list) and value:  # a list inside a record, such as its messages
            return None
    return None


def _is_whole(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _utf16(head: bytes) -> str | None:
    """The UTF-16 encoding of a text, by its byte order mark or the zero byte of a first ASCII character; else None."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if len(head) >= 4 and head[0] and not head[1] and head[2] and not head[3]:
        return "utf-16-le"
    if len(head) >= 4 and not head[0] and head[1] and not head[2] and head[3]:
        return "utf-16-be"
    return None


class _Transcoded(io.RawIOBase):
    """UTF-16 read as UTF-8."""

    def __init__(self, stream: Binary, encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
        self._waiting = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._waiting:
            data = self._stream.read(READ_BYTES)
            self._waiting = self._decoder.decode(data, final=not data).encode(errors="replace")
            if not data:
                break
        given = self._waiting[: len(buffer)]
        self._waiting = self._waiting[len(given) :]
        buffer[: len(given)] = given
        return len(given)
