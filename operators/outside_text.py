r"""Checks and cleans text from outside: files, replies, bodies of endpoints.

Two things break later stages. A lone surrogate (half an emoji, such as `\ud83d` in JSON) cannot be encoded as UTF-8, so
every Parquet writer refuses it. A control character means that the text was damaged earlier: JSON, for example, turns
the LaTeX command `\frac` into a form feed.
"""

import re

_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 without tab and line feed, DEL, C1
_DAMAGE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_INDENTED_LINE = re.compile(r"\n(?:\t|  )[ \t]*\S")
LEAST_INDENT, ONE_LINE_INDENT = 2, 4  # columns
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


def is_damaged(text: str) -> bool:
    """Whether `text` holds a surrogate or a control character other than tab, line feed and carriage return."""
    return _DAMAGE.search(text) is not None


def control_character(text: str) -> str | None:
    """The name of the first control character, such as `U+000C form feed`; None if there is none.

    Tab and line feed do not count as control characters here. Carriage return does, so a caller that expects CRLF line
    ends replaces them first.
    """
    found = _CONTROL.search(text)
    if found is None:
        return None
    character = found.group()
    return f"U+{ord(character):04X} {_NAMES.get(character, 'control character')}"


def trim(text: str) -> str:
    """`text` without blank lines around it and without white space around its first and last line.

    The first line keeps its indentation if it looks like code: it is the text's only line and is indented by at least
    four columns, or it is indented by at least two and another indented line follows.
    """
    inner = text.strip()
    if text[:1].strip() or not inner:
        return inner
    lead = text[: len(text) - len(text.lstrip())]
    indent = lead.rpartition("\n")[2]
    if indent.strip(" \t"):  # some other white space, such as a no-break space
        return inner
    columns = len(indent.expandtabs(4))
    is_code = _INDENTED_LINE.search(inner) is not None if "\n" in inner else columns >= ONE_LINE_INDENT
    return indent + inner if is_code and columns >= LEAST_INDENT else inner
