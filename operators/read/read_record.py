"""Reads one record: its pairs in canonical form with their ids, or the reason why it cannot be used."""

import hashlib
import json
import unicodedata
from json.encoder import encode_basestring

from operators.outside_text import is_damaged, trim
from operators.read.config import ReadConfig
from operators.read.dialogues import SYSTEM, USER, Exchange, Turn
from operators.read.record_fields import Found, read_fields
from operators.read.record_formats import Record

_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"

ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def row_id_of(instruction: str, input_: str, response: str, turns_before: str = "", turns_after: str = "") -> str:
    """32 hex digits of the SHA-256 of the canonical texts, and of the turns around them if there are any.

    Chat markup is escaped later and does not change it.
    """
    around = (turns_before, turns_after) if turns_before or turns_after else ()
    listed = ",".join([encode_basestring(text) for text in (instruction, input_, response, *around)])
    return hashlib.sha256(f"[{listed}]".encode()).hexdigest()[:32]  # as `hash_of` the list, which takes twice as long


def canonical(text: str) -> str:
    """`text` in NFC, with LF line ends, trimmed but for the indentation of code."""
    if "\r" in text:
        text = text.replace("\r\n", "\n")
    return trim(unicodedata.normalize("NFC", text))


def extract(record: Record, config: ReadConfig) -> Found:
    """The pairs of a record in canonical form, or as far as they are known with the reason against them."""
    if record.reason:
        return Found([Exchange(record.raw, "", "", reason=record.reason)], [])
    if not isinstance(record.value, dict):
        return Found([Exchange(record.raw or repr(record.value), "", "", reason="not_an_object")], [])
    try:
        found = read_fields(record.value, config.columns, config.pass_through, config.turns)
    except RecursionError:
        return Found([Exchange(record.raw, "", "", reason="too_deep")], [])
    exchanges = [each if each.reason else _checked(_with_system(each, config), config) for each in found.exchanges]
    return Found(exchanges, [*found.unread, *record.unread])


def _with_system(pair: Exchange, config: ReadConfig) -> Exchange:
    if config.system_turn == "keep" or not pair.before or pair.before[0].role != SYSTEM:
        return pair
    system, *turns = pair.before
    if not system.content.strip():
        return pair._replace(before=tuple(turns))
    if config.system_turn == "quarantine":
        return pair._replace(input=system.content, reason="system_turn")
    asked = next((place for place, turn in enumerate(turns) if turn.role == USER), None)
    if asked is not None:
        turns[asked] = turns[asked]._replace(content=f"{system.content}\n\n{turns[asked].content}")
    elif pair.instruction.strip():
        pair = pair._replace(instruction=f"{system.content}\n\n{pair.instruction}")
    return pair._replace(before=tuple(turns))


def _checked(pair: Exchange, config: ReadConfig) -> Exchange:
    if pair.reason:
        return pair
    text = "".join([*pair.texts, *[turn.content for turn in (*pair.before, *pair.after)]])
    if len(text) > config.max_chars:
        return pair._replace(reason="too_long")
    if is_damaged(text):
        return pair._replace(reason="control_characters")
    around = (_canonical_turns(pair.before), _canonical_turns(pair.after)) if pair.before or pair.after else ()
    clean = Exchange(canonical(pair.instruction), canonical(pair.input), canonical(pair.response), *around)
    if not clean.instruction.strip(_INVISIBLE):
        return clean._replace(reason="empty_instruction")
    if not clean.response.strip(_INVISIBLE):
        return clean._replace(reason="empty_response")
    return clean


def _canonical_turns(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """System prompts without text are left out."""
    cleaned = (turn._replace(content=canonical(turn.content)) for turn in turns)
    return tuple(turn for turn in cleaned if turn.content or turn.role != SYSTEM)


def hash_of(value: object) -> str:
    """32 hex digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(ENCODER.encode(value).encode()).hexdigest()[:32]
