"""Takes credentials out of whatever is kept or shown: manifests, lineage, reports, messages and stored errors.

Credentials come in where an address or a request's field is configured. Everything else of a value stays: a manifest
has to tell two values apart, and a new password makes nothing again. A name such as `think_token` or `sort_key` may
hold a credential or not: its value is not shown, and two values stay two.
"""

import hashlib
import re
from typing import Any

HIDDEN = "…"
# What stands before the last word of a name: `hf_`, `X-`, or the first part of `clientSecret`.
_BEFORE = r"(?:.*(?:[_.-]|(?-i:(?<=\w)(?=[A-Z][a-z]))))?"
_KEYS = r"(?:api|access|account|private|secret|storage|subscription)[_-]?keys?(?:[_-]?ids?)?"
_TOKENS = r"(?:access|api|auth|bearer|csrf|github|hf|hub|id|login|oauth|personal|refresh|security|session)[_-]?tokens?"
# Names of options and fields that hold nothing but credentials.
_CERTAIN = re.compile(
    rf"{_BEFORE}(?:{_KEYS}|{_TOKENS}|secrets?|passw(?:or)?ds?|pass|pwd|auth|authorization|credentials?|sas|jwts?|cookies?)",
    re.IGNORECASE,
)
# Names that may: the special tokens of a tokenizer are none.
_POSSIBLE = re.compile(
    r"(?!.*(?:bos|eos|eot|pad|unk|sep|cls|mask|stop|begin|end|special)_?token$)"
    rf"(?:{_BEFORE}(?:key|token|signature|sig)|tokens)",
    re.IGNORECASE,
)
# A scheme is short: without a limit the time grows with the square of a text of dots.
_USER = re.compile(r"\b([a-z][a-z0-9+.-]{0,30})://([^/?#\s]+)@", re.IGNORECASE)
_CONTAINERS = ("abfs", "abfss", "wasb", "wasbs")  # before the @ of these stands a container
_OPTION = re.compile(r"(?<=[?&;])([\w.-]+)=([^&;\s\"'<>]+)")
_BEARER = re.compile(r"\b(bearer) (?=[^\s\"']*\d)[^\s\"']{8,}", re.IGNORECASE)
_SCHEMES = "basic|bearer|token|apikey|digest|negotiate"
# A header as it is written in requests and in errors that repeat them.
_HEADER = re.compile(
    rf"\b(authorization|(?:x-)?api-key)([\"']?\s?[:=]\s?[\"']?)(?:({_SCHEMES})\s+[^\s\"',;}}]+|(?=[^\s\"']*\d)[^\s\"',;}}]{{8,}})",
    re.IGNORECASE,
)
_SCHEMED = re.compile(rf"({_SCHEMES})\s+\S.*", re.IGNORECASE | re.DOTALL)
LONGEST_PASSWORD = 6  # words; a text of more is a question or a prompt that happens to have such a name


def without_credentials(value: Any) -> Any:
    """`value` with user, password and secret options of addresses hidden, and texts under names such as `api_key`.

    Args:
        value: plain JSON, or a text in which addresses may stand.
    """
    return _hidden(value, only_certain=False)


def without_certain_credentials(value: Any) -> Any:
    """As `without_credentials`, but only what can be nothing else: for hashes, which must tell values apart."""
    return _hidden(value, only_certain=True)


def _hidden(value: Any, *, only_certain: bool) -> Any:
    if isinstance(value, str):
        return _in_text(value, only_certain)
    if isinstance(value, dict):
        return {name: _of_field(str(name), item, only_certain) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(item, only_certain=only_certain) for item in value]
    return value


def _of_field(name: str, value: Any, only_certain: bool) -> Any:
    if _CERTAIN.fullmatch(name):
        return _covered(value, only_certain)
    is_word = isinstance(value, str) and value and len(value.split()) == 1
    if is_word and not only_certain and _POSSIBLE.fullmatch(name):
        return value if value.startswith(HIDDEN) else f"{HIDDEN}{hashlib.sha256(value.encode()).hexdigest()[:8]}"
    if isinstance(value, list | tuple) and _POSSIBLE.fullmatch(name):
        return [_of_field(name, item, only_certain) for item in value]
    return _hidden(value, only_certain=only_certain)


def _covered(value: Any, only_certain: bool) -> Any:
    """What stands under the name of a credential: every text in it, unless it is one to read."""
    if isinstance(value, dict):
        return {name: _covered(item, only_certain) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_covered(item, only_certain) for item in value]
    if not isinstance(value, str) or not value:
        return value
    if schemed := _SCHEMED.fullmatch(value):
        return f"{schemed[1]} {HIDDEN}"
    is_read = len(value.split()) > LONGEST_PASSWORD or value.rstrip().endswith("?")
    return _in_text(value, only_certain) if is_read else HIDDEN


def _in_text(text: str, only_certain: bool) -> str:
    if "://" in text:
        text = _USER.sub(_without_user, text)
    if "=" in text:
        names = (_CERTAIN,) if only_certain else (_CERTAIN, _POSSIBLE)
        text = _OPTION.sub(lambda found: f"{found[1]}={_of_option(found, names)}", text)
    text = _HEADER.sub(lambda found: f"{found[1]}{found[2]}{found[3] + ' ' if found[3] else ''}{HIDDEN}", text)
    return _BEARER.sub(rf"\1 {HIDDEN}", text)


def _of_option(found: re.Match[str], names: tuple[re.Pattern[str], ...]) -> str:
    return HIDDEN if any(name.fullmatch(found[1]) for name in names) else found[2]


def _without_user(found: re.Match[str]) -> str:
    is_container = found[1].lower() in _CONTAINERS and ":" not in found[2]
    return found[0] if is_container else f"{found[1]}://{HIDDEN}@"
