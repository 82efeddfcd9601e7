"""Which columns of a record are instruction, input and response, by the names that public data sets use.

Names are compared without case. Every column that is not empty is used, passed through, or named as unread.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Literal, NamedTuple

from operators.outside_text import replace_surrogates
from operators.read.dialogues import (
    ASSISTANT,
    SYSTEM,
    USER,
    Dialogue,
    Exchange,
    Policy,
    Turn,
    exchanges_of,
    read_dialogue,
    tree_path,
)
from operators.read.message_tables import COLUMNS as OF_MESSAGES
from operators.read.nested_columns import roots, with_nested

Field = Literal["messages", "instruction", "input", "response", "system", "history"]

# Of a field's names, the first column that is not empty counts.
NAMES: dict[Field, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "turns", "chat", "chosen"),
    "instruction": (
        "instruction",
        "prompt",
        "question",
        "query",
        "problem",
    ),  # Alpaca, TRL, GSM8K, MetaMath, Numina
    "input": ("input", "context"),  # Alpaca, Dolly
    # Beside a solution, the answer is only its result (Numina, OpenR1).
    "response": ("output", "response", "completion", "solution", "answer", "target", "chosen"),
    "system": ("system", "system_prompt", "system_message"),  # LLaMA-Factory, OpenOrca
    "history": ("history",),  # LLaMA-Factory: a list of pairs
}

_NO_INPUT = re.compile(r"""["'(<\[]*\s*(?:no ?input|n/a|nan)\s*[\])>"'.]*""", re.IGNORECASE)
LONGEST_PLACEHOLDER = 32  # characters
_NO_RESPONSE = "nan"  # what pandas writes for a missing text


# Columns of pictures and sounds, and what stands for one of them in a text.
_MEDIA = frozenset(f"{kind}{plural}" for kind in ("image", "audio", "video") for plural in ("", "s"))
_MEDIA_PLACE = re.compile(r"<(?:image|audio|video)(?:_\d+|-\d+)?>")
PAIR: tuple[Field, ...] = ("instruction", "input", "response")
_ABSENT: tuple[str, object] = ("", None)


class Found(NamedTuple):
    """The pairs of a record to reflect on, at least one, and the columns that are not empty and not used."""

    exchanges: list[Exchange]
    unread: list[str]


def plain(name: str) -> str:
    """A column's name without case, and with underscores for spaces and hyphens: `System Prompt` is system_prompt."""
    return re.sub(r"[\s-]+", "_", name.strip()).casefold()


def is_wanted(name: str, columns: Mapping[Field, str], pass_through: Iterable[str]) -> bool:
    """Whether a column of this name is read."""
    known = name in OF_MESSAGES or any(plain(name) in names for names in NAMES.values())
    return known or name in columns.values() or name in roots(columns.values()) or name in pass_through


def read_fields(
    record: Mapping[str, object], columns: Mapping[Field, str], pass_through: Iterable[str], policy: Policy
) -> Found:
    """The pairs of a record, or one with the reason why there is none: missing_field, non_string_field,
    malformed_messages, non_text_content, no_plain_answer (the assistant only calls tools).

    Args:
        record: a column's name -> its value.
        columns: a field -> the name of its column, in place of the usual names.
        pass_through: columns that are kept unchanged.
        policy: which pairs of a dialogue.
    """
    record = with_nested(record, columns.values()) if columns else record
    plain_names, layout = _layout(tuple(record), tuple(columns.items()))
    if plain_names is not None:
        texts = [record[name] for name in plain_names]
        if all(isinstance(text, str) for text in texts):
            return Found([_without_placeholders(Exchange(*texts))], [])  # type: ignore[arg-type]
    values = {field: _first(record, names) if names else _ABSENT for field, names in layout.items()}
    used = {name for name, _ in values.values()}
    name, messages, others = _messages(values)
    if messages is not None:
        dialogue = read_dialogue(messages)
        system_name, system = values["system"]
        used = {name, system_name} if _is_said(system, dialogue.turns) else {name}
        exchanges = _exchanges(dialogue, system, policy)
        others += [f"{name}.{key}" for key in dialogue.unread]
        if name == values["instruction"][0]:  # a prompt as a list of messages, and its completion
            used.add(values["response"][0])
    else:
        exchanges = _from_texts(values, policy)
    kept = used.union(pass_through, roots(columns.values()))
    unread = [name for name in record if name not in kept and not is_empty(record[name])]
    if any(plain(name) in _MEDIA for name in unread) and any(map(_shows_media, exchanges)):
        exchanges = [each._replace(reason=each.reason or "non_text_content") for each in exchanges]
    return Found(exchanges, [*unread, *others])


def missing_fields(record: Mapping[str, object], columns: Mapping[Field, str]) -> list[Field]:
    """Those of instruction and response for which the record has no column, or an empty one."""
    record = with_nested(record, columns.values())
    _, layout = _layout(tuple(record), tuple(columns.items()))
    needed: tuple[Field, ...] = ("instruction", "response")
    return [field for field in needed if not layout[field] or is_empty(_first(record, layout[field])[1])]


def extra_json(record: Mapping[str, object], pass_through: Iterable[str]) -> str:
    """The columns that are passed through as a JSON object; "" if the record has none of them."""
    kept = {name: _as_plain_json(record[name]) for name in pass_through if name in record}
    return replace_surrogates(json.dumps(kept, ensure_ascii=False, default=str)) if kept else ""


def is_empty(value: object) -> bool:
    """Whether there is nothing in a column: null, NaN, white space, an empty list or object."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, list | dict | tuple | bytes) and not value)


@lru_cache(maxsize=4096)
def _layout(
    names: tuple[str, ...], columns: tuple[tuple[Field, str], ...]
) -> tuple[tuple[str, str, str] | None, Mapping[Field, tuple[str, ...]]]:
    """Names of a record's columns by field, in order of preference.

    The first result is the three names, if the record has exactly instruction, input and response, else None. Most
    records have these, and `read_fields` then looks for nothing else.
    """
    mapped = dict(columns)
    of_plain: dict[str, list[str]] = {}
    for name in names:
        of_plain.setdefault(plain(name), []).append(name)
    of: dict[Field, tuple[str, ...]] = {
        field: (mapped[field],) * (mapped[field] in names)
        if field in mapped
        else tuple(name for known in NAMES[field] for name in of_plain.get(known, ()) if name not in mapped.values())
        for field in NAMES
    }
    three = [of[field] for field in PAIR]
    if len(names) == len(three) == sum(map(len, three)) and all(three):
        return (three[0][0], three[1][0], three[2][0]), of
    return None, of


def _first(record: Mapping[str, object], names: tuple[str, ...]) -> tuple[str, object]:
    """Name and value of the first column that is not empty, or of the first column if all are empty."""
    name = names[0]
    value = record[name]
    if len(names) > 1 and is_empty(value):
        name = next((name for name in names if not is_empty(record[name])), name)
        value = record[name]
    return name, None if isinstance(value, float) and math.isnan(value) else value


def _messages(values: Mapping[Field, tuple[str, object]]) -> tuple[str, object, list[str]]:
    """Column and value of a record's dialogue, or None; and a note on a tree's replies outside its best path."""
    name, value = values["messages"]
    prompt_name, prompt = values["instruction"]
    if isinstance(value, str) and value.lstrip().startswith("["):  # a column of CSV
        value = _parsed(value)
    asked = prompt if isinstance(prompt, list) and all(isinstance(item, dict) for item in prompt) else []
    is_ending = bool(asked) and name == values["response"][0] and not _has_user(value)  # `chosen` as in TRL
    if isinstance(value, list) and (value or is_empty(prompt)) and not is_ending:
        return name, value, []
    if isinstance(prompt, dict) and "replies" in prompt:
        path, others = tree_path(prompt)
        return prompt_name, path, [f"{prompt_name}: {others} other replies"] * (others > 0)
    if asked:
        completion = value if is_ending else values["response"][1]
        ending = completion if isinstance(completion, list) else [{"role": ASSISTANT, "content": completion}]
        return prompt_name, [*asked, *ending], []
    return name, value if is_empty(prompt) else None, []


def _has_user(messages: object) -> bool:
    return any(turn.role == USER for turn in read_dialogue(messages).turns)


def _parsed(text: str) -> object:
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value


def _is_said(system: object, turns: list[Turn]) -> bool:
    """Whether the text of a system column is in the dialogue, where it was put or was already."""
    return isinstance(system, str) and (not turns or turns[0].role != SYSTEM or turns[0].content == system)


def _exchanges(dialogue: Dialogue, system: object, policy: Policy) -> list[Exchange]:
    turns, reason = dialogue.turns, dialogue.reason
    if not reason and isinstance(system, str) and system.strip() and turns[0].role != SYSTEM:
        turns = [Turn(SYSTEM, system), *turns]
    found = [] if reason else list(exchanges_of(turns, policy))
    if found:
        return found
    is_asked = any(turn.role == USER for turn in turns)
    ends_in_calls = is_asked and any(turn.is_call for turn in turns)
    said = "\n\n".join(f"{turn.role}: {turn.content}" for turn in turns)
    return [Exchange(said, "", "", reason=reason or ("no_plain_answer" if ends_in_calls else "malformed_messages"))]


def _from_texts(values: Mapping[Field, tuple[str, object]], policy: Policy) -> list[Exchange]:
    found = (values["instruction"][1], _number_as_text(values["input"][1]), _number_as_text(values["response"][1]))
    instruction, given, response = (_shown(value) for value in found)
    pair = Exchange(instruction, given, response)
    if found[0] is None or found[2] is None:
        return [pair._replace(reason="missing_field")]
    if not all(isinstance(value, str | None) for value in found):
        return [pair._replace(reason="non_string_field")]
    pair = _without_placeholders(pair)
    if values["system"] is _ABSENT and values["history"] is _ABSENT:
        return [pair]
    before = _context(values["system"][1], values["history"][1])
    if before is None:
        return [pair._replace(reason="malformed_messages")]
    if policy == "last" or len(before) < 2:
        return [pair._replace(before=tuple(before))]
    asked = f"{pair.instruction}\n\n{pair.input}" if pair.input.strip() else pair.instruction
    return list(exchanges_of([*before, Turn(USER, asked), Turn(ASSISTANT, pair.response)], policy))


def _shows_media(pair: Exchange) -> bool:
    texts = (*pair.texts, *(turn.content for turn in (*pair.before, *pair.after)))
    return any(_MEDIA_PLACE.search(text) for text in texts)


def _number_as_text(value: object) -> object:
    """A whole number, such as the answer of a sum, as text. Values that can be written in two ways (0.30) stay."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _shown(value: object) -> str:
    return value if isinstance(value, str) else "" if value is None else repr(value)


def _without_placeholders(pair: Exchange) -> Exchange:
    if 0 < len(pair.input) <= LONGEST_PLACEHOLDER and _NO_INPUT.fullmatch(pair.input.strip()):
        pair = pair._replace(input="")
    if len(pair.response) <= LONGEST_PLACEHOLDER and pair.response.strip() == _NO_RESPONSE:
        pair = pair._replace(response="")
    return pair


def _context(system: object, history: object) -> list[Turn] | None:
    """The system prompt and the earlier turns that other columns hold; None if they cannot be read."""
    if not isinstance(system, str | None) or not isinstance(history, list | str | None):
        return None
    turns = [Turn(SYSTEM, system)] if system and system.strip() else []
    listed = _parsed(history) if isinstance(history, str) else history
    if is_empty(listed):
        return turns
    if not isinstance(listed, list):
        return None
    for item in listed:
        if isinstance(item, list) and len(item) == 2 and all(isinstance(text, str) for text in item):
            turns += [Turn(USER, item[0]), Turn(ASSISTANT, item[1])]
        else:
            dialogue = read_dialogue(listed)
            return None if dialogue.reason else [*turns[: len(turns) and turns[0].role == SYSTEM], *dialogue.turns]
    return turns


def _as_plain_json(value: object) -> object:
    """`value` in strict JSON: NaN and infinity become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _as_plain_json(item) for key, item in value.items()}
    return [_as_plain_json(item) for item in value] if isinstance(value, list) else value
