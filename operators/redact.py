"""Takes credentials out of whatever is kept or shown: manifests, lineage, reports, messages and stored errors.

Credentials come in where an address or a request's field is configured. Everything else of a value stays: a manifest
has to tell two values apart, and a new password makes nothing again.
"""

import re
from typing import Any

HIDDEN = "…"
# Names of options and fields that hold a credential; the special tokens of a tokenizer are none.
_SECRET = re.compile(
    r"(?!.*(?:bos|eos|eot|pad|unk|sep|cls|mask|stop|begin|end|special)_?token$)(?:.*(?:[_.-]|(?-i:(?<=\w)(?=[A-Z][a-z]))))?"
    r"(?:(?:api|access|account|private|secret|storage|subscription)[_-]?key(?:[_-]?id)?|key|secret|passw(?:or)?d|pass|pwd|"
    r"token|auth|authorization|credentials?|signature|sig|sas|jwt|cookie)",
    re.IGNORECASE,
)
# A scheme is short: without a limit the time grows with the square of a text of dots.
_USER = re.compile(r"\b([a-z][a-z0-9+.-]{0,30})://([^/?#\s]+)@", re.IGNORECASE)
_CONTAINERS = ("abfs", "abfss", "wasb", "wasbs")  # before the @ of these stands a container
_OPTION = re.compile(r"(?<=[?&;])([\w.-]+)=([^&;\s\"'<>]+)")
_BEARER = re.compile(r"\b(bearer) (?=[^\s\"']*\d)[^\s\"']{8,}", re.IGNORECASE)


def without_credentials(value: Any) -> Any:
    """`value` with user, password and secret options of addresses hidden, and texts under names such as `api_key`.

    Args:
        value: plain JSON, or a text in which addresses may stand.
    """
    if isinstance(value, str):
        return _in_text(value)
    if isinstance(value, dict):
        return {name: _of_field(name, item) for name, item in value.items()}
    return [without_credentials(item) for item in value] if isinstance(value, list | tuple) else value


def _of_field(name: object, value: Any) -> Any:
    # A text of several words is a question or a prompt that happens to have such a name.
    is_word = isinstance(value, str) and value and len(value.split()) == 1
    return HIDDEN if is_word and _SECRET.fullmatch(str(name)) else without_credentials(value)


def _in_text(text: str) -> str:
    if "://" in text:
        text = _USER.sub(_without_user, text)
    if "=" in text:
        text = _OPTION.sub(lambda found: f"{found[1]}={HIDDEN if _SECRET.fullmatch(found[1]) else found[2]}", text)
    return _BEARER.sub(rf"\1 {HIDDEN}", text)


def _without_user(found: re.Match[str]) -> str:
    is_container = found[1].lower() in _CONTAINERS and ":" not in found[2]
    return found[0] if is_container else f"{found[1]}://{HIDDEN}@"
