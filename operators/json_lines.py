"""Writes the output of a run as JSON objects with run, refresh and stage, one per line: `$RECYCLE_LOG_FORMAT=json`.

Collectors of logs, such as Loki and CloudWatch, then need no pattern to find a stage or a refresh.
"""

import io
import json
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

FORMAT_VARIABLE = "RECYCLE_LOG_FORMAT"
Wrapper = Callable[[TextIO, TextIO], tuple[TextIO, TextIO]]  # wraps the streams for results and errors
# Matches the stage at the beginning of a line; some lines begin with another word.
_STAGE = re.compile(r"(?:made )?(?!storage|log|warning|refused)([a-z]+(?:_[a-z]+)*): ")


def json_is_asked_for() -> bool:
    """Whether the environment asks for JSON.

    Raises:
        ValueError: it asks for an unknown format.
    """
    asked = os.environ.get(FORMAT_VARIABLE, "")
    if asked not in ("", "text", "json"):
        raise ValueError(f"${FORMAT_VARIABLE}: {asked!r} is not a format; give text or json")
    return asked == "json"


class JsonLines(io.TextIOBase):
    """A text stream that writes each complete line at once, as a JSON object, to another stream."""

    def __init__(self, stream: TextIO, level: Literal["info", "warning", "error"], **about: Any) -> None:
        """
        Args:
            stream: where to write.
            level: of plain lines.
            about: fields of every line, such as run and refresh.
        """
        self._stream, self._level, self._about, self._begun = stream, level, about, ""

    def write(self, text: str) -> int:
        """Add text, and write each line that it completes, except empty ones."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if line.strip():
                stage = _STAGE.match(line)
                self.record(line, **({"stage": stage[1]} if stage else {}))
        return len(text)

    def record(self, message: str, level: str | None = None, **fields: Any) -> None:
        """Write one object: time (ISO 8601, UTC), level, the fields of every line, `fields`, message."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": level or self._level, **self._about, **fields, "message": message}
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()

    def flush(self) -> None:
        """Do nothing: complete lines are written already, and an incomplete one waits for its end."""


def wrapper_as_asked(**about: Any) -> Wrapper:
    """Return a function that wraps a pair of streams, so that they write the format of `$RECYCLE_LOG_FORMAT`.

    Args:
        about: fields of every object.

    Raises:
        ValueError: see `json_is_asked_for`.
    """
    if not json_is_asked_for():
        return lambda out, err: (out, err)
    return lambda out, err: (JsonLines(out, "info", **about), JsonLines(err, "warning", **about))  # type: ignore[return-value]
