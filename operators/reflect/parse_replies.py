"""Parses a teacher's raw reply into the critique and the rewritten texts, or a reason why it cannot be used.

A reply that can be read in exactly one way is read, also with fences, prose or thoughts around it, or with headings in
another style. Every other reply is refused: the row then gets one more turn, or keeps its original, and the reason is
counted. The raw reply stays in the ledger, so that a better parser costs no call.
"""

import re

from operators.outside_text import control_character, replace_surrogates
from operators.reflect.placeholders import is_placeholder
from operators.reflect.prompts import ReplyFormat
from operators.reflect.refusals import REFUSAL
from operators.reflect.reply_headings import read_headings
from operators.reflect.reply_json import read_json
from operators.reflect.reply_parts import Parsed, Rejected, section_named
from operators.reflect.rewrite_text import clean_reply, clean_rewrite

__all__ = ["Parsed", "Rejected", "parse_reply"]

NOT_THERE = ("no_json", "missing_section")  # reasons to look for the other form
_MEMBER = re.compile(r"^[ \t]*[\"'“”](\w{1,60})[\"'“”][ \t]*:", re.MULTILINE)


def parse_reply(
    reply: str | None,
    finish_reason: str | None,
    form: ReplyFormat,
    criteria: dict[str, str],
    sections: dict[str, str],
    *,
    critique_chars: int | None = None,
    text_chars: int | None = None,
) -> Parsed | Rejected:
    """Parse one raw reply; never raises an error.

    Args:
        reply: the teacher's text; None if the call failed.
        finish_reason: "stop", or "length" if it was cut off by max_tokens.
        form: the format that was asked for; a reply in the other format is read too.
        criteria: the names of the criteria, in order.
        sections: reply property -> heading of the delimited format.
        critique_chars: longest part of the critique by one criterion that is kept; the ledger keeps all.
        text_chars: longest rewritten text; a reply with a longer one is refused.
    """
    if reply is None:
        return Rejected("call_failed")
    text = clean_reply(reply)
    parsed = text if isinstance(text, Rejected) else _parse(text, finish_reason, form, criteria, sections)
    if isinstance(parsed, Rejected):
        if finish_reason == "length":
            return Rejected("cut_off")
        is_refusal = parsed.reason in NOT_THERE and REFUSAL.match(reply.lstrip("\ufeff"))
        return Rejected("refusal") if is_refusal else parsed
    texts: dict[str, str] = {}
    for name, written in parsed.texts.items():
        cleaned = clean_rewrite(written, sections, criteria)
        if isinstance(cleaned, Rejected):
            return cleaned
        if text_chars is not None and len(cleaned) > text_chars:
            return Rejected("over_length")
        texts[name] = cleaned
    critique = {name: _shown(said, critique_chars) for name, said in parsed.critique.items()}
    return Parsed(critique, texts) if all(critique.values()) else Rejected("missing_criterion")


def _parse(
    text: str, finish_reason: str | None, form: ReplyFormat, criteria: dict[str, str], sections: dict[str, str]
) -> Parsed | Rejected:
    as_json = read_json(text, criteria, sections) if form == "json" or "{" in text else Rejected("no_json")
    # The names in an object look like headings, also in one that is not valid JSON because of a bare quote.
    if any(section_named(name, sections) for name in _MEMBER.findall(text)):
        return as_json if form == "json" or isinstance(as_json, Parsed) else Rejected("missing_section")
    if form == "json":
        if as_json != Rejected("no_json"):
            return as_json
        other = read_headings(text, finish_reason, criteria, sections)
        return other if isinstance(other, Parsed) else as_json
    as_headings = read_headings(text, finish_reason, criteria, sections)
    if as_headings == Rejected("missing_section") and isinstance(as_json, Parsed):
        return as_json
    return as_headings


def _shown(said: str, limit: int | None) -> str:
    """The critique by one criterion, for people to read: storable, without control characters, and not too long."""
    text = replace_surrogates(said).strip()
    is_type = text == "string"  # of the schema
    if is_type or (is_placeholder(text) and text.casefold().rstrip(".") not in ("none", "n/a", "na")):
        return ""
    while control_character(text):
        text = "".join(letter for letter in text if not control_character(letter))
    return text if limit is None or len(text) <= limit else f"{text[: limit - 1]}…"
