r"""The gate for text from outside: files, replies, bodies of endpoints.

Two things break what comes later. A lone surrogate (half an emoji, as `\ud83d` in JSON) cannot be encoded as UTF-8, so
every Parquet writer refuses it. A control character means that the text was damaged on its way, as a form feed that
JSON made of the LaTeX command `\frac`.
"""

import re

_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 without tab and line feed, DEL, C1
_NAMES = {
    "\x00": "null",
    "\x07": "bell",
    "\x08": "backspace",
    "\x0b": "vertical tab",
    "\x0c": "form feed",
    "\r": "carriage return",
    "\x1b": "escape",
    "\x7f": "delete",
    "\x85": "next line",
}


def replace_surrogates(text: str) -> str:
    """`text` with U+FFFD in place of each surrogate, so that it can be encoded as UTF-8."""
    return _SURROGATE.sub("\ufffd", text)


def control_character(text: str) -> str | None:
    """The name of the first control character, such as `U+000C form feed`; None if there is none.

    Tab and line feed are no control characters here. Carriage return is one: a caller that knows CRLF line ends
    replaces them first.
    """
    found = _CONTROL.search(text)
    if found is None:
        return None
    character = found.group()
    return f"U+{ord(character):04X} {_NAMES.get(character, 'control character')}"
