"""What a run prints, as JSON objects with run, refresh and stage, one a line: `$RECYCLE_LOG_FORMAT=json`.

For collectors of logs (Loki, CloudWatch and the like), which then need no pattern to find a stage or a refresh.
"""

import io
import json
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

FORMAT_VARIABLE = "RECYCLE_LOG_FORMAT"
Dressed = Callable[[TextIO, TextIO], tuple[TextIO, TextIO]]  # wraps the streams for results and errors
# How our lines name the stage that they are about; some begin with another word.
_STAGE = re.compile(r"(?:made )?(?!storage|log|warning|refused)([a-z]+(?:_[a-z]+)*): ")


def json_is_asked_for() -> bool:
    """Whether the environment asks for JSON.

    Raises:
        ValueError: it asks for a format that there is not.
    """
    asked = os.environ.get(FORMAT_VARIABLE, "")
    if asked not in ("", "text", "json"):
        raise ValueError(f"${FORMAT_VARIABLE}: {asked!r} is no format; give text or json")
    return asked == "json"


class JsonLines(io.TextIOBase):
    """A text stream that writes each of its lines as an object to another one, and at once."""

    def __init__(self, stream: TextIO, level: Literal["info", "warning", "error"], **about: Any) -> None:
        """
        Args:
            stream: where to write.
            level: of plain lines.
            about: fields of every line, such as run and refresh.
        """
        self._stream, self._level, self._about, self._begun = stream, level, about, ""

    def write(self, text: str) -> int:
        """Take text; each line that it completes is written, empty ones are not."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if line.strip():
                stage = _STAGE.match(line)
                self.record(line, **({"stage": stage[1]} if stage else {}))
        return len(text)

    def record(self, message: str, level: str | None = None, **fields: Any) -> None:
        """Write one object: time (ISO 8601, UTC), level, what every line holds, `fields`, message."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": level or self._level, **self._about, **fields, "message": message}
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()

    def flush(self) -> None:
        """Every line is written at once; a line that has only begun waits for its end."""


def dressed_as_asked(**about: Any) -> Dressed:
    """What makes a pair of streams write as `$RECYCLE_LOG_FORMAT` says; `about` are fields of every object.

    Raises:
        ValueError: see `json_is_asked_for`.
    """
    if not json_is_asked_for():
        return lambda out, err: (out, err)
    return lambda out, err: (JsonLines(out, "info", **about), JsonLines(err, "warning", **about))  # type: ignore[return-value]
