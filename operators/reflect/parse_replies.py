"""Reads what the teacher wrote: raw text in, the critique and the rewritten texts out, or the reason why not.

Strict on purpose. A reply is refused when it was cut off, lacks a section, repeats a heading, or says nothing; the row
then keeps its original, and the reason is counted. The raw reply stays in the ledger, so a better parser costs nothing.
"""

import json
import re
from dataclasses import dataclass
from itertools import pairwise

from operators.reflect.prompts import CRITIQUE_HEADING, END_HEADING, ReplyFormat

# A reply that opens like this and never gets to a rewrite is a refusal rather than bad form.
REFUSAL = re.compile(r"^\s*(i(['\u2019]m| am) sorry|i can(no|['\u2019])t|as an ai\b)", re.IGNORECASE)


@dataclass(frozen=True)
class Parsed:
    """A parsed reply: criterion -> sentence, and reply property -> rewritten text."""

    critique: dict[str, str]
    texts: dict[str, str]


@dataclass(frozen=True)
class Rejected:
    """Why a reply cannot be used; the reason is a word that is counted and shown."""

    reason: str


def parse_reply(
    reply: str | None, finish_reason: str | None, form: ReplyFormat, criteria: dict[str, str], sections: dict[str, str]
) -> Parsed | Rejected:
    """Parse one raw reply.

    Args:
        reply: the teacher's text; None if the call failed.
        finish_reason: "stop", or "length" if it was cut off by max_tokens.
        form: the format that was asked for.
        criteria: the names of the criteria, in order.
        sections: reply property -> heading of the delimited format.
    """
    if reply is None:
        return Rejected("call_failed")
    parsed = _parse_json(reply, criteria, sections) if form == "json" else _parse_delimited(reply, criteria, sections)
    if isinstance(parsed, Rejected):
        if finish_reason == "length":
            return Rejected("cut_off")
        return Rejected("refusal") if REFUSAL.match(reply) else parsed
    empty = [name for name, text in parsed.texts.items() if not text]
    return Rejected("empty_section") if empty else parsed


def _parse_json(reply: str, criteria: dict[str, str], sections: dict[str, str]) -> Parsed | Rejected:
    try:
        values = json.loads(reply)
    except (json.JSONDecodeError, RecursionError):
        return Rejected("no_json")
    if not isinstance(values, dict):
        return Rejected("no_json")
    if any(not isinstance(values.get(name), str) for name in [*criteria, *sections]):
        return Rejected("missing_section")
    return Parsed({name: values[name].strip() for name in criteria}, {name: values[name].strip() for name in sections})


def _parse_delimited(reply: str, criteria: dict[str, str], sections: dict[str, str]) -> Parsed | Rejected:
    headings = [CRITIQUE_HEADING, *sections.values(), END_HEADING]
    places = []
    for heading in headings:
        found = list(re.finditer(rf"^[ \t]*\[{re.escape(heading)}\][ \t]*$", reply, re.MULTILINE))
        if len(found) != 1:
            return Rejected("missing_section" if not found else "repeated_heading")
        places.append(found[0])
    if [place.start() for place in places] != sorted(place.start() for place in places):
        return Rejected("sections_out_of_order")
    if reply[places[-1].end() :].strip():
        return Rejected("text_after_end")
    bodies = [reply[here.end() : then.start()].strip() for here, then in pairwise(places)]
    critique = {name: _criticism(bodies[0], name) for name in criteria}
    if not all(critique.values()):
        return Rejected("missing_criterion")
    return Parsed(critique, dict(zip(sections, bodies[1:], strict=True)))


def _criticism(body: str, criterion: str) -> str:
    name = re.escape(criterion).replace("_", "[ _]")
    found = re.search(rf"^[-*\s]*{name}[*]*\s*:\s*(?P<text>.+)$", body, re.MULTILINE | re.IGNORECASE)
    return found["text"].strip() if found else ""
