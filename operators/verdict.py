"""Reads the JSON object of a judge's reply, with any text or thoughts around it."""

import json
import re
from collections.abc import Sequence
from typing import Any

from operators.thoughts import begins_with_thoughts, reply_after_thoughts

MOST_OBJECTS = 50  # opening braces that are tried in one reply

_NUMBER = re.compile(r"\s*(\d{1,3}(?:\.\d{1,3})?)\s*(?:/\s*10)?\s*")


def verdict_in(reply: str, names: Sequence[str]) -> dict[str, Any] | None:
    """The object of a reply that has all of these members; None if there is no object, or two that contradict.

    If no object has them all, the last one is given. A reply that ends in its thoughts has no verdict: one that is
    weighed there is not the last word.
    """
    text = reply_after_thoughts(reply)
    found = [] if begins_with_thoughts(text) else _objects(text)
    whole = [each for each in found if all(name in each for name in names)]
    try:
        distinct = {json.dumps([each[name] for name in names]) for each in whole}
    except RecursionError:  # it reads deeper lists than it writes
        return None
    if len(distinct) > 1:
        return None
    candidates = whole or found
    return candidates[-1] if candidates else None


def number_of(value: Any) -> float | None:
    """A score as a number; also one that is written as "8" or "8/10". None for everything else."""
    if isinstance(value, str) and (found := _NUMBER.fullmatch(value)):
        return float(found[1])
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    except OverflowError:  # hundreds of digits
        return None


def _objects(text: str) -> list[dict[str, Any]]:
    decoder, place = json.JSONDecoder(strict=False), 0
    found: list[dict[str, Any]] = []
    for _ in range(MOST_OBJECTS):
        begin = text.find("{", place)
        if begin < 0:
            break
        try:
            value, place = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError):
            place = begin + 1
            continue
        found.append(value)
    return found
