"""Handles an example that is longer than a pack: it is quarantined, truncated, or split into parts."""

from dataclasses import dataclass
from typing import Literal

from operators.student.encode import IGNORED, Encoded

Overlong = Literal["quarantine", "truncate", "split"]
_PART = "#"  # ids of rows are hashes without "#"; the second part of row x is x#2


@dataclass(frozen=True)
class Fitted:
    """Parts of one example, each at most as long as a pack.

    Attributes:
        parts: in their order; empty if nothing is left to learn.
        lost: number of supervised tokens that are in no part.
        cut: whether the parts lack text that matters: the end of an answer, or text before an answer.
    """

    parts: list[Encoded]
    lost: int = 0
    cut: bool = False


def fit(encoded: Encoded, max_tokens: int, overlong: Overlong) -> Fitted:
    """Fit an example into packs; an example that fits is its only part.

    Args:
        encoded: tokens and labels.
        max_tokens: the longest part.
        overlong: "truncate" keeps the first `max_tokens` tokens, as TRL and axolotl do, and so loses the end of the
            answer with the end-of-turn token. "split" loses no supervised token: each part begins with the last token
            of the part before it, which predicts the next token; parts without loss are left out. "quarantine" gives
            no part.
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
    # The last part is ignored: without loss, it holds only text that the template writes after the answer.
    return Fitted(learnt, cut=any(not _supervised(part.labels) for part in parts[:-1]))


def part_id(row_id: str, part: int) -> str:
    """The id of part number `part`, from 0, of a row; the first part has the row's id."""
    return f"{row_id}{_PART}{part + 1}" if part else row_id


def row_of(part: str) -> str:
    """The id of the row to which an id in a pack belongs."""
    return part if is_first_part(part) else part.rpartition(_PART)[0]


def is_first_part(row_id: str) -> bool:
    """Whether an id in a pack is that of a whole row or its first part, not of a later part."""
    _, mark, number = row_id.rpartition(_PART)
    return not (mark and number.isdigit())


def _supervised(labels: list[int]) -> int:
    return sum(label != IGNORED for label in labels[1:])
