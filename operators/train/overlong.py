"""What becomes of an example that is longer than a pack: out with a reason, cut, or in several parts."""

from dataclasses import dataclass
from typing import Literal

from operators.student.encode import IGNORED, Encoded

Overlong = Literal["quarantine", "truncate", "split"]
_PART = "#"  # ids of rows are hashes; a second part of row x is x#2


@dataclass(frozen=True)
class Fitted:
    """Parts of one example, each at most as long as a pack.

    Attributes:
        parts: in their order; none if nothing is left to learn.
        lost: supervised tokens that are in no part.
        cut: whether text that counts is in no part: the end of an answer, or what comes before one.
    """

    parts: list[Encoded]
    lost: int = 0
    cut: bool = False


def fit(encoded: Encoded, max_tokens: int, overlong: Overlong) -> Fitted:
    """Cut an example to size; one that fits is its only part.

    Args:
        encoded: tokens and labels.
        max_tokens: the longest part.
        overlong: "truncate" keeps the first `max_tokens` tokens, as TRL and axolotl do; so what is lost is the end of
            the answer, with the end-of-turn token. "split" loses no supervised token: each part begins with the last
            token of the part before it, from which the next one is predicted, and parts without loss are left out.
            "quarantine" gives no part.
    """
    tokens, labels = encoded.input_ids, encoded.labels
    if len(tokens) <= max_tokens:
        return Fitted([encoded])
    if overlong == "quarantine":
        return Fitted([], _supervised(labels))
    if overlong == "truncate":
        kept = Encoded(tokens[:max_tokens], labels[:max_tokens])
        lost = _supervised(labels) - _supervised(kept.labels)
        return Fitted([kept] if _supervised(kept.labels) else [], lost, cut=lost > 0)
    begins = range(0, len(tokens) - 1, max_tokens - 1)
    parts = [
        Encoded(tokens[begin : begin + max_tokens], [IGNORED, *labels[begin + 1 : begin + max_tokens]])
        for begin in begins
    ]
    learnt = [part for part in parts if _supervised(part.labels)]
    # Of the last part only what a template writes behind the answer may be without loss.
    return Fitted(learnt, cut=any(not _supervised(part.labels) for part in parts[:-1]))


def part_id(row_id: str, part: int) -> str:
    """The id of a part of a row, counted from 0; the first part has the row's own."""
    return f"{row_id}{_PART}{part + 1}" if part else row_id


def row_of(part: str) -> str:
    """The row that an id of a pack is a part of."""
    return part if is_first_part(part) else part.rpartition(_PART)[0]


def is_first_part(row_id: str) -> bool:
    """Whether an id of a pack stands for a row, not for a later part of one."""
    _, mark, number = row_id.rpartition(_PART)
    return not (mark and number.isdigit())


def _supervised(labels: list[int]) -> int:
    return sum(label != IGNORED for label in labels[1:])
