"""Reads the delimited form of a reply: a critique, each section under its heading, and the end.

A heading is looked for in several forms: first `[Better Answer]` on a line of its own, then with marks around it or
text after it, then without brackets. In the first form that occurs, it must occur once.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from operators.reflect.placeholders import is_placeholder
from operators.reflect.reply_parts import OF_WHAT, SYMBOL, Parsed, Rejected, criterion_named, noun_named, section_named

LONGEST_LINE = 200  # characters of a line in which a name is searched
PLAIN = 3  # rank from which a label has text behind it or no marks
LAST_CHARS = 80  # of a reply, in which to look for an end without brackets

_LEAD = re.compile(
    rf"(?:[\s>#*_`\"“”•+\-–—=~|]|{SYMBOL}|</?(?:b|strong|em|i|u|p|h[1-6])>|\(?\d{{1,2}}[.):]\)?\s*|"
    r"(?:step|part|section) (?:\d{1,2}|[ivx]{1,4})\b[.:]?\s*|(?:[ivx]{1,4}|[a-e])[.)]\s+)*",
    re.IGNORECASE,
)
_CLOSING = r"(?:[*_`\"”]+(?!\w)|</(?:b|strong|em|i|u|p|h[1-6])>)"
_OPEN, _CLOSE = r"<\[【［{(「《", r">\]】］})」》"
_BRACKETED = re.compile(
    rf"\\?[{_OPEN}]{{1,2}}\s*(?P<name>[^{_OPEN}{_CLOSE}]{{1,60}}?)\s*\\?[{_CLOSE}]{{1,2}}{_CLOSING}?\s*"
    rf"(?P<mark>[:：]?){_CLOSING}?"
)
_PLAIN = re.compile(
    rf"(?P<name>[^\W\d_][\w /&'’,\u00a0-]{{0,80}}?)(?P<bold>{_CLOSING}?)\s*(?:\([^()]{{0,60}}\)\s*)?{_CLOSING}?"
    rf"(?:(?P<mark>[:：]{{1,2}}|\s?[-–—](?=\s)|\s?[|=→](?=\s|$)){_CLOSING}?|(?<=[*_`\"”>])(?=\s)|"
    r"\s*[=~#*_–—-]+\s*$|$)"
)
# Other words after "End of" are text: "[End of scene]" is a line of a play.
_END_NAME = (
    r"\\?[<\[【［「《]\s*/?\s*end(?: of (?:the )?(?:\w+ )?"
    r"(?:answer|response|reply|instruction|critique|form|text|document|output|message))?\s*\\?[>\]】］」》]"
)
_END = re.compile(rf"{_END_NAME}[*_`.:]*[ \t]*$", re.IGNORECASE | re.MULTILINE)
_END_LINE = re.compile(rf"^[ \t>#*_`]*{_END.pattern}", re.IGNORECASE | re.MULTILINE)
_ENDED = re.compile(rf"[ \t>#*_`]*{_END_NAME}[*_`.:]*\s*\Z", re.IGNORECASE)
# An END in capitals must follow a finished sentence, and `end` needs marks: code in Ruby or SQL has neither.
_PLAIN_END = re.compile(
    r"\n[ \t]*(?:[*_#]+[ \t]*(?i:end)[*_.]*|End[*_.]*|(?<=[.!?…。！？\n]\n)END\.?|"
    # other words in brackets, or half of the brackets
    r"[*_]*\\?[<\[【［({「《][ /]*(?i:ende?|fin|fim|done|eof|stop|finished|结束|結束|終わり|конец)[!.]?"
    rf"(?i:{OF_WHAT})? *\\?[>\]】］)}}」》]?[*_.!]*|(?i:ende?)[>\]】］][*_.!]*|"
    rf"[-=~*_# ]*(?i:end{OF_WHAT})[-=~*_# .!]*|[-=~]{{2,}} *(?i:end) *[-=~]{{2,}})\s*\Z"
)
_CLOSING_TAG = re.compile(r"\s*</[\w -]{1,60}>\s*\Z")
_TAGS_IN_A_LINE = re.compile(r"(?P<closed></(?P<name>[\w -]{1,60})>)[ \t]*(?=</?[\w -]{1,60}>)")
_FINISHED = re.compile(r"[.!?:…。！？।؟)\]}>|`\"'”’»*;]\s*\Z")
CRITIQUE = frozenset({"critique", "critiques", "criticism"})


@dataclass(frozen=True)
class _Label:
    """A line that names something: `**Helpfulness:** fine`."""

    name: str
    rank: int  # 0 is the form that was asked for; a higher rank is further from it
    start: int
    end: int  # where the text after the name begins
    is_bare: bool  # nothing but the name itself


def read_headings(
    reply: str, finish_reason: str | None, criteria: dict[str, str], sections: dict[str, str]
) -> Parsed | Rejected:
    """Read the sections of `reply`; their texts are not cleaned yet."""
    reply = _TAGS_IN_A_LINE.sub(lambda found: _apart(found, criteria, sections), reply)
    every = list(_labels(reply))
    labels = [label for label in every if not label.name.startswith("/")]
    tags = ((label.name.strip("/ "), label.start) for label in every if label.name.startswith("/"))
    # Other closing tags are part of a text, as in HTML.
    closed = {name: start for name, start in tags if name.casefold() in CRITIQUE or section_named(name, sections)}
    critique = _only([label for label in labels if label.name.casefold() in CRITIQUE])
    if critique == Rejected("missing_section"):  # without a heading, the text before the first section is the critique
        critique = _Label("", 0, 0, 0, is_bare=False)
    order = [critique]
    for name in sections:
        named = [(label, section_named(label.name, sections)) for label in labels]
        exact = [label for label, found in named if found == (name, True)]
        found = exact or [label for label, meant in named if meant == (name, False)]
        order.append(_only(found or _by_noun(labels, name, sections)))
    refused = next((place for place in order if isinstance(place, Rejected)), None)
    if refused:
        return refused
    places = [place for place in order if isinstance(place, _Label)]
    if [place.start for place in places] != sorted(place.start for place in places):
        return Rejected("sections_out_of_order")
    last = [
        start
        for name, start in closed.items()
        if section_named(name, {list(sections)[-1]: list(sections.values())[-1]})
    ]
    end = last[0] if last else _end(reply, places[-1].end, finish_reason)
    if isinstance(end, Rejected):
        return end
    ends = [place.start for place in places[1:]] + [end]
    # In the papers [End] closes each section; here only the last section needs it.
    inner = [
        [start for start in closed.values() if place.end <= start < stop]
        for place, stop in zip(places, ends, strict=True)
    ]
    stops = [min([*tags, stop]) for tags, stop in zip(inner, ends, strict=True)]
    bodies = [_without_end(reply[place.end : stop]) for place, stop in zip(places, stops, strict=True)]
    critique_of = critique_by_criterion(bodies[0], criteria)
    if not all(critique_of.values()):
        return Rejected("missing_criterion")
    return Parsed(critique_of, dict(zip(sections, bodies[1:], strict=True)))


def _apart(found: re.Match[str], criteria: dict[str, str], sections: dict[str, str]) -> str:
    """A closing tag of ours and the next tag on two lines; tags of HTML stay together."""
    is_ours = criterion_named(found["name"], criteria) or section_named(found["name"], sections)
    return f"{found['closed']}\n" if is_ours or found["name"].casefold() in CRITIQUE else found.group()


def _by_noun(labels: list[_Label], name: str, sections: dict[str, str]) -> list[_Label]:
    """Headings with a noun alone, such as [Answer]; without marks such a line may belong to the text."""
    return [label for label in labels if label.rank < PLAIN and noun_named(label.name, sections) == (name, False)]


def _without_end(body: str) -> str:
    body = body.rstrip()
    return body[:-LAST_CHARS] + _ENDED.sub("", body[-LAST_CHARS:])


def _labels(text: str) -> Iterator[_Label]:
    start = 0
    for line in text.split("\n"):
        label = _label(line, start)
        if label:
            yield label
        start += len(line) + 1


def _label(line: str, start: int) -> _Label | None:
    whole, line = line, line[:LONGEST_LINE]
    lead = _LEAD.match(line)
    begin = lead.end() if lead else 0
    has_lead = bool(line[:begin].strip())
    bracketed = _BRACKETED.match(line, begin)
    found = bracketed or _PLAIN.match(line, begin)
    if found is None:
        return None
    rest = whole[found.end() :].strip(" \t*_`")
    if bracketed:
        rank = 3 if rest else int(has_lead or found.end() < len(line.rstrip()) or bool(found["mark"]))
    elif has_lead:
        rank = 4 if rest else 2
    else:
        rank = (6 if rest else 5) if found["mark"] else 7
    is_bare = not (bracketed or has_lead or found["mark"])
    return _Label(found["name"].strip(), rank, start, start + found.end(), is_bare)


def _only(labels: list[_Label]) -> _Label | Rejected:
    """The one label of the lowest rank."""
    if not labels:
        return Rejected("missing_section")
    lowest = min(label.rank for label in labels)
    best = [label for label in labels if label.rank == lowest]
    return best[0] if len(best) == 1 else Rejected("repeated_heading")


def _end(reply: str, start: int, finish_reason: str | None) -> int | Rejected:
    """Where the last section ends: at `[End]`, or after a finished sentence if the teacher stopped by itself."""
    for pattern in (_END_LINE, _END):
        found = list(pattern.finditer(reply, start))
        if found:
            between = reply[found[0].end() : found[-1].start()] if len(found) > 1 else ""
            is_one = not between.strip()
            return found[0].start() if is_one else Rejected("repeated_heading")
    plain = _PLAIN_END.search(reply, max(start, len(reply) - LAST_CHARS))
    if plain:
        return plain.start()
    is_whole = finish_reason == "stop" and bool(_FINISHED.search(reply, start))
    return len(reply) if is_whole else Rejected("missing_section")


def critique_by_criterion(body: str, criteria: dict[str, str]) -> dict[str, str]:
    """The text about each criterion in the lines of a critique; "" if there is none."""
    labels = [label for label in _labels(body) if not label.is_bare]
    named = [(label, criterion_named(label.name, criteria)) for label in labels]
    exact = {found[0] for _, found in named if found and found[1]}
    kept = [(label, found[0]) for label, found in named if found and (found[1] or found[0] not in exact)]
    said: dict[str, list[str]] = {name: [] for name in criteria}
    stops = [label.start for label, _ in kept[1:]] + [len(body)]
    for (label, name), stop in zip(kept, stops, strict=False):
        said[name].append(_said(body[label.end : stop]))
    if not all(said.values()):
        return _in_one_line(body, criteria)
    return {name: "\n".join(filter(None, texts)) for name, texts in said.items()}


def _said(text: str) -> str:
    """The text after a label; "" if another label follows directly."""
    first, _, others = text.partition("\n")
    whole = _CLOSING_TAG.sub("", text).strip()
    text = whole.strip(" \t\n*_`-•#>|")
    if not first.strip(" \t*_`") and others.strip():
        label = _label(others.strip().partition("\n")[0], 0)
        if label and not label.is_bare and len(label.name.split()) < 5:
            return ""
    is_empty = is_placeholder(whole) or is_placeholder(text)
    return "" if is_empty and text.casefold() not in ("none", "n/a", "na") else text


def _in_one_line(body: str, criteria: dict[str, str]) -> dict[str, str]:
    """The same for criteria on one line: `helpfulness: fine; relevance: fine`."""
    names = {name: re.escape(name).replace("_", "[ _-]") for name in criteria}
    found = [
        (match.start(), match.end(), name)
        for name, pattern in names.items()
        for match in re.finditer(rf"(?<!\w){pattern}[*_]*\s*[:：][*_]*", body, re.IGNORECASE)
    ]
    if len(found) != len(criteria) or {name for *_, name in found} != set(criteria):
        return dict.fromkeys(criteria, "")
    found.sort()
    stops = [start for start, *_ in found[1:]] + [len(body)]
    said = {name: body[end:stop].strip(" \t\n;|,*_-•") for (_, end, name), stop in zip(found, stops, strict=True)}
    return {name: "" if is_placeholder(text) and text else text for name, text in said.items()}
