"""What every format gives: a stream of records, defects among them."""

from collections.abc import Sequence
from typing import NamedTuple

MAX_RECORD_BYTES = 16 << 20
READ_BYTES = 1 << 20


class Record(NamedTuple):
    """What a file holds at `position`, or `reason` why it is no record.

    Attributes:
        position: byte offset of a line, index of anything else.
        value: the record; a dict unless the file holds something else.
        raw: the source text where there is one; with a reason it is what a person should see.
        reason: "" if `value` can be used.
        unread: columns that are not empty in this part of a table and were not read.
    """

    position: int
    value: object
    raw: str
    reason: str = ""
    unread: tuple[str, ...] = ()


def distinct(names: Sequence[str]) -> Sequence[str]:
    """Names of columns or keys, the second `output` as `output (2)`: nothing reads that one, and so it is named."""
    if len(set(names)) == len(names):
        return names
    taken, numbers = set(names), dict[str, int]()
    found = []
    for name in names:
        other, number = name, numbers.get(name, 1)
        while number > 1 and other in taken:
            other, number = f"{name} ({number})", number + 1
        taken.add(other)
        numbers[name] = max(2, number)  # where the next one of this name begins to look: a record may hold a million
        found.append(other)
    return found
