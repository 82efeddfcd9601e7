"""Rebuilds trees from a table of messages: one row per message with the id of its parent, as oasst publishes them.

A tree becomes one record, at the place of its first message. The messages of a few trees may be mixed: up to `HELD`
messages are kept in memory. When a tree had to be given out, later messages of it have no parent any more.
"""

import itertools
from collections.abc import Iterable, Iterator

from operators.read.record import Record

ID, PARENT, TREE = "message_id", "parent_id", "message_tree_id"
_OF_MESSAGE = ("role", "text", "content", "rank", "deleted", PARENT)
COLUMNS = frozenset((ID, TREE, *_OF_MESSAGE))
HELD = 20_000  # messages
ORPHAN = "missing_parent"
Message = dict[str, object]


def is_message_table(names: Iterable[str]) -> bool:
    """Whether columns of these names are a table of messages."""
    return {ID, PARENT, "role"} <= set(names)


def assembled(records: Iterator[Record]) -> Iterator[Record]:
    """The records of a file; a table of messages becomes trees in the form of oasst's nested files.

    A message whose parent is not in the table is a record of its own, with the reason missing_parent. Other records
    pass unchanged.
    """
    first: list[Record] = []
    for record in records:
        first.append(record)
        if not record.reason:
            break
    every = itertools.chain(first, records)
    if first and isinstance(first[-1].value, dict) and is_message_table(first[-1].value):
        return _trees(every)
    return every


def _trees(records: Iterator[Record]) -> Iterator[Record]:
    held: dict[object, list[Record]] = {}
    tree_of: dict[object, object] = {}  # message id -> tree, for held messages whose table does not name the tree
    count = 0
    for record in records:
        message = record.value
        if record.reason or not isinstance(message, dict):
            yield record
            continue
        parent = _id(message.get(PARENT))
        name = _id(message.get(TREE)) or tree_of.get(parent) or parent or _id(message.get(ID))
        tree_of[_id(message.get(ID))] = name
        held.setdefault(name, []).append(record)
        count += 1
        while count > HELD and len(held) > 1:
            oldest = held.pop(next(iter(held)))
            count -= len(oldest)
            for each in oldest:
                tree_of.pop(_id(each.value.get(ID)), None)  # type: ignore[attr-defined]
            yield from _tree(oldest)
    for messages in held.values():
        yield from _tree(messages)


def _tree(messages: list[Record]) -> Iterator[Record]:
    """One record for the tree below the first message without a parent, and one for each message outside that tree."""
    children: dict[str, list[Record]] = {}
    for record in messages:
        children.setdefault(_id(record.value.get(PARENT)), []).append(record)  # type: ignore[attr-defined]
    roots = children.pop("", [])
    for root in roots:
        yield root._replace(value=_nested(root, children))
    for record in sorted(itertools.chain.from_iterable(children.values()), key=lambda each: each.position):
        value: Message = record.value  # type: ignore[assignment]
        said = value.get("text") or value.get("content")
        yield Record(record.position, None, str(said or value.get(ID)), ORPHAN)


def _nested(root: Record, children: dict[str, list[Record]]) -> Message:
    """The tree below a message as `{"prompt": {..., "replies": [...]}}`, with the other columns of its first message.

    Messages that it takes are removed from `children`.
    """
    first: Message = root.value  # type: ignore[assignment]
    top = _message(first)
    waiting = [(_id(first.get(ID)), top)]
    while waiting:
        name, parent = waiting.pop()
        replies: list[Message] = []
        for record in children.pop(name, []) if name else []:
            value: Message = record.value  # type: ignore[assignment]
            replies.append(_message(value))
            waiting.append((_id(value.get(ID)), replies[-1]))
        parent["replies"] = replies
    return {name: value for name, value in first.items() if name not in _OF_MESSAGE} | {"prompt": top}


def _message(value: Message) -> Message:
    kept = {name: value[name] for name in ("role", "text", "content") if value.get(name) is not None}
    rank = _number(value.get("rank"))
    return kept | ({} if rank is None else {"rank": rank}) | ({"deleted": True} if _is_true(value) else {})


def _is_true(value: Message) -> bool:
    return str(value.get("deleted")).strip().casefold() in ("true", "1")


def _id(value: object) -> str:
    """An id as text; "" if there is none: null, NaN or an empty cell of CSV."""
    return "" if value is None or value != value else str(value).strip()


def _number(value: object) -> int | None:
    try:
        return int(float(str(value)))
    except (ValueError, OverflowError):
        return None
