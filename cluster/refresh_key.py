"""The keys of refreshes: parts of folder names, so they follow one pattern."""

import re

REFRESH_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def require_refresh_key(key: str) -> str:
    """Check that a key can name a refresh, as part of a folder's name; returns it.

    Raises:
        ValueError: it names the key and the pattern.
    """
    if not REFRESH_KEY.fullmatch(key):
        raise ValueError(
            f"refresh: {key!r} is not a key; give a letter or digit and up to 99 more letters, digits, '.', '_' and "
            "'-', such as 2026-11-26"
        )
    return key
