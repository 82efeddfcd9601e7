"""Opens text files as bytes of UTF-8, whatever they are packed in, and tells whether they can be read line by line."""

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
# Keys that hold all records of a file that is one JSON object.
WRAPPERS = frozenset(
    ("data", "rows", "records", "examples", "instances", "items", "samples", "entries", "train", "instructions")
)

_KEY = re.compile(r'\s*,?\s*("(?:[^"\\]|\\.)*")\s*:\s*')
_LIST = re.compile(r"\[\s*(?=[{\[\]]|$)")
_DECODER = json.JSONDecoder()


class Binary(Protocol):
    """The part of a binary stream that readers use."""

    def read(self, size: int = ..., /) -> bytes:
        """At most `size` bytes; none at the end."""

    def readline(self, size: int = ..., /) -> bytes:
        """Up to and with the next line feed, at most `size` bytes."""


def format_of(path: str) -> tuple[str, str | None]:
    """The format that a file's name tells, in lower case, and its compression or None: `a.JSONL.gz` is jsonl, gzip."""
    *_, before, last = ["", "", *path.rpartition("/")[2].lower().split(".")]
    return (before, CODECS[last]) if last in CODECS else (last, None)


def open_text(filesystem: fs.FileSystem, path: str, start: int = 0) -> tuple[io.BufferedReader, bool]:
    """A stream of the file's text as UTF-8, from byte `start` on, and whether its bytes are those of the file.

    If not, the file was decompressed, or transcoded from UTF-16, and must be read from its start to its end. Bytes that
    are no UTF-8 stay as they are. Half a character of UTF-16 becomes U+FFFD.

    Raises:
        OSError: as of the file system; while reading, if the compressed data is damaged (`is_damaged`).
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
    """Whether a JSON file has a record a line, so that it can be cut between lines and a broken line costs one record.

    Args:
        head: the first bytes of its text, at most `READ_BYTES`.
        kind: as of `format_of`; decides where the text does not.
    """
    if _utf16(head):
        return False
    text = head.removeprefix(BOM).decode(errors="replace").lstrip()
    first, _, rest = text.partition("\n")
    first = first.strip()
    if first.startswith("["):  # one array, or an array a line
        return bool(rest.strip()) and _is_whole(first)
    if first == "{" or wrapped_records(text) is not None:
        return False
    return kind in LINES or (first.startswith("{") and _is_whole(first))


def wrapped_records(text: str) -> int | None:
    """Where the records begin in a JSON object that holds them in a list, such as {"version": 1, "data": [...]}.

    Args:
        text: begins with the object; may end anywhere.

    Returns:
        The place after the list's bracket; None if this is no such object.
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
        if isinstance(value, list) and value:  # of a record, such as its messages
            return None
    return None


def _is_whole(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _utf16(head: bytes) -> str | None:
    """The encoding of a text that begins so, by its byte order mark or by the zero byte beside a first ASCII one."""
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
