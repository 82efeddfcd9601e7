"""The record type that readers of every format give; a defect of a file is a record too."""

from collections.abc import Sequence
from typing import NamedTuple

MAX_RECORD_BYTES = 16 << 20
READ_BYTES = 1 << 20


class Record(NamedTuple):
    """What a file holds at `position`, or the `reason` why this is not a record.

    Attributes:
        position: byte offset of a line, or the index in other formats.
        value: the record; a dict unless the file holds something else.
        raw: the source text if there is one; with a reason, the text to show to a person.
        reason: "" if `value` can be used.
        unread: columns that are not empty in this part of a table and were not read.
    """

    position: int
    value: object
    raw: str
    reason: str = ""
    unread: tuple[str, ...] = ()


def distinct(names: Sequence[str]) -> Sequence[str]:
    """Names of columns or keys without repetition: a second `output` becomes `output (2)`, which nothing reads."""
    if len(set(names)) == len(names):
        return names
    taken, numbers = set(names), dict[str, int]()
    found = []
    for name in names:
        other, number = name, numbers.get(name, 1)
        while number > 1 and other in taken:
            other, number = f"{name} ({number})", number + 1
        taken.add(other)
        numbers[name] = max(2, number)  # the next one of this name starts here: a record may have a million of them
        found.append(other)
    return found
