"""Takes credentials out of whatever is kept or shown: manifests, lineage, reports, messages and stored errors.

Credentials are in configured addresses and in configured fields of requests. Everything else of a value stays, because
a manifest has to tell two values apart; a new password makes no work stale. A name such as `think_token` or `sort_key`
may or may not hold a credential: a short hash replaces its value, so that two values still differ.
"""

import hashlib
import re
from typing import Any

HIDDEN = "…"
# The part of a name before its last word: `hf_`, `X-`, or the first part of `clientSecret`.
_BEFORE = r"(?:.*(?:[_.-]|(?-i:(?<=\w)(?=[A-Z][a-z]))))?"
_KEYS = r"(?:api|access|account|private|secret|storage|subscription)[_-]?keys?(?:[_-]?ids?)?"
_TOKENS = r"(?:access|api|auth|bearer|csrf|github|hf|hub|id|login|oauth|personal|refresh|security|session)[_-]?tokens?"
# Names of options and fields that hold nothing but credentials.
_CERTAIN = re.compile(
    rf"{_BEFORE}(?:{_KEYS}|{_TOKENS}|secrets?|passw(?:or)?ds?|pass|pwd|auth|authorization|credentials?|sas|jwts?|cookies?)",
    re.IGNORECASE,
)
# Names that may hold a credential. Those of a tokenizer's special tokens do not.
_POSSIBLE = re.compile(
    r"(?!.*(?:bos|eos|eot|pad|unk|sep|cls|mask|stop|begin|end|special)_?token$)"
    rf"(?:{_BEFORE}(?:key|token|signature|sig)|tokens)",
    re.IGNORECASE,
)
# The limit on the scheme's length matters: without it, a long text of dots would take quadratic time.
_USER = re.compile(r"\b([a-z][a-z0-9+.-]{0,30})://([^/?#\s]+)@", re.IGNORECASE)
_CONTAINERS = ("abfs", "abfss", "wasb", "wasbs")  # in these schemes the part before the @ is a container
_OPTION = re.compile(r"(?<=[?&;])([\w.-]+)=([^&;\s\"'<>]+)")
_BEARER = re.compile(r"\b(bearer) (?=[^\s\"']*\d)[^\s\"']{8,}", re.IGNORECASE)
_SCHEMES = "basic|bearer|token|apikey|digest|negotiate"
# A header as it is written in requests and in errors that repeat them.
_HEADER = re.compile(
    rf"\b(authorization|(?:x-)?api-key)([\"']?\s?[:=]\s?[\"']?)(?:({_SCHEMES})\s+[^\s\"',;}}]+|(?=[^\s\"']*\d)[^\s\"',;}}]{{8,}})",
    re.IGNORECASE,
)
_SCHEMED = re.compile(rf"({_SCHEMES})\s+\S.*", re.IGNORECASE | re.DOTALL)
SHORTEST_SECRET = 8  # characters; a shorter one may be a part of ordinary words
LONGEST_PASSWORD = 6  # words; a longer text is a question or a prompt that happens to have such a name


def without_credentials(value: Any) -> Any:
    """`value` without users, passwords and secret options in addresses, and without texts under names like `api_key`.

    Args:
        value: plain JSON, or a text in which addresses may stand.
    """
    return _hidden(value, only_certain=False)


def without_certain_credentials(value: Any) -> Any:
    """As `without_credentials`, but hides only certain credentials: for hashes, which must tell other values apart."""
    return _hidden(value, only_certain=True)


def without_secret(text: str, secret: str) -> str:
    """`text` with `<key>` in place of one secret; a short one (`x` for a local server) counts as a word only."""
    if not secret:
        return text
    if len(secret) >= SHORTEST_SECRET:
        return text.replace(secret, "<key>")
    return re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "<key>", text)


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
    """The value of a field that is named like a credential, with every text hidden that is not a sentence."""
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
