"""No reply of any kind raises an error, takes long, or leaves leftovers in an accepted text."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.outside_text import control_character
from operators.reflect.parse_replies import Parsed, Rejected, parse_reply
from operators.reflect.prompts import (
    INSTRUCTION_CRITERIA,
    INSTRUCTION_SECTIONS,
    REPAIRABLE,
    RESPONSE_CRITERIA,
    RESPONSE_SECTIONS,
    ReplyFormat,
)
from operators.reflect.rewrite_text import clean_rewrite

FORMS: tuple[ReplyFormat, ...] = ("json", "delimited")
STAGES = [(INSTRUCTION_CRITERIA, INSTRUCTION_SECTIONS), (RESPONSE_CRITERIA, RESPONSE_SECTIONS)]
OUTCOMES = {*REPAIRABLE, "call_failed", "refusal"}
PIECES = st.sampled_from([
    "[Critique]", "[Better Answer]", "[New Instruction]", "[New Answer]", "[End]", "**", "## ", "helpfulness: ", "\n",
    "\r\n", "\\n", "```", "```json\n", "{", "}", '{"', '": "', '", "', '"}', '"', "\\", "\\frac", "\\u",
    "$", "<think>", "</think>", "...", "Here is a better answer: ", "(Note: I changed it.)",
    "better_response", "\ufeff", "<answer>", "</answer>", "No changes needed.", "[The rest is the same.]", "I. ", "| ",
    "<|im_end|>", "I changed the answer.", "Key improvements:", "Answer", "→", "</b>",
    "\0", "\ud83d", "\x0c", " ", "\t", "Paris.", "accuracy", "level of detail", "9" * 5000, "[", "]", "1. ", "巴黎",
    "{'a': ", "{1, 2}", ", 2: ", "[1]: ", "'}",
])  # fmt: skip
ANY_TEXT = st.one_of(st.text(), st.text(st.characters(codec=None)), st.lists(PIECES, max_size=40).map("".join))


def whole(text: str, form: ReplyFormat, criteria: dict[str, str], sections: dict[str, str]) -> str:
    if form == "json":
        return json.dumps(dict.fromkeys(criteria, "fine") | dict.fromkeys(sections, text))
    critique = "\n".join(f"{name.replace('_', ' ')}: fine" for name in criteria)
    return "\n".join(["[Critique]", critique, *(f"[{name}]\n{text}" for name in sections.values()), "[End]"])


def check(reply: str, finish_reason: str | None = "stop") -> None:
    for form in FORMS:
        for criteria, sections in STAGES:
            parsed = parse_reply(reply, finish_reason, form, criteria, sections)
            if isinstance(parsed, Rejected):
                assert parsed.reason in OUTCOMES
                continue
            assert all(parsed.critique[name] for name in criteria)
            for name in sections:
                text = parsed.texts[name]
                assert text.strip()
                assert control_character(text) is None
                text.encode()
                assert clean_rewrite(text, sections, criteria) == text, "what was accepted is accepted again as it is"
            json.dumps(parsed.critique, ensure_ascii=False).encode()


@settings(max_examples=150, deadline=None)
@given(ANY_TEXT, st.sampled_from(["stop", "length", None]))
def test_any_text_is_read_or_refused(reply: str, finish_reason: str | None) -> None:
    check(reply, finish_reason)


@settings(max_examples=150, deadline=None)
@given(ANY_TEXT, st.sampled_from(FORMS), st.sampled_from(STAGES))
def test_any_text_in_a_whole_reply_is_read_or_refused(
    text: str, form: ReplyFormat, stage: tuple[dict[str, str], dict[str, str]]
) -> None:
    check(whole(text, form, *stage))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FORMS), st.data(), ANY_TEXT)
def test_a_reply_with_a_piece_cut_out_or_put_in_is_read_or_refused(
    form: ReplyFormat, data: st.DataObject, piece: str
) -> None:
    reply = whole('Say "Paris".\n\n```py\nprint(1)\n```', form, RESPONSE_CRITERIA, RESPONSE_SECTIONS)
    start = data.draw(st.integers(0, len(reply)))
    stop = data.draw(st.integers(start, len(reply)))
    check(reply[:start] + piece + reply[stop:])


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from("ab .,\n\"'(){}=+-\\\t巴é😀"), min_size=1), st.sampled_from(FORMS))
def test_a_plain_text_comes_back_letter_for_letter(text: str, form: ReplyFormat) -> None:
    """Only the edges of an accepted text may change, and JSON keeps every character."""
    parsed = parse_reply(
        whole(text, form, RESPONSE_CRITERIA, RESPONSE_SECTIONS), "stop", form, RESPONSE_CRITERIA, RESPONSE_SECTIONS
    )
    if isinstance(parsed, Parsed):
        assert parsed.texts["better_response"].strip() in text.strip()
        lost = len(text.strip()) - len(parsed.texts["better_response"].strip())
        assert lost == 0 or "---" in text


NO_JSON = [
    "{'a': 1, 2: 'b'}", "{'a': 1, [1]: 2}", "{'a': 1, (1, 2): 3}",
    "{'better_response': ...}", "{'better_response': {1, 2}}", "{'better_response': b'Paris.'}",
    "{'better_response': 2j}", "{'better_response': 0x" + "f" * 5000 + "}",
    '{"better_response": ' + '{"a":' * 600 + "1" + "}" * 601,
]  # fmt: skip


@pytest.mark.parametrize("value", NO_JSON, ids=lambda value: value[:40])
def test_python_and_nesting_that_json_cannot_write_are_read_or_refused(value: str) -> None:
    check(value)
    check(f"It is `{value}`.")
    for criteria, sections in STAGES:
        reply = whole(f"Use this:\n\n{value}", "delimited", criteria, sections)
        check(reply)
        parsed = parse_reply(reply, "stop", "delimited", criteria, sections)
        assert "better_response" in value or isinstance(parsed, Parsed), "it is code in a perfect reply"


def test_a_python_dict_in_a_python_dict_is_read_like_an_object_in_an_object() -> None:
    reply = str({"critique": dict.fromkeys(RESPONSE_CRITERIA, "it's fine"), "better_response": "Paris."})
    parsed = parse_reply(reply, "stop", "json", RESPONSE_CRITERIA, RESPONSE_SECTIONS)
    assert parsed == Parsed(dict.fromkeys(RESPONSE_CRITERIA, "it's fine"), {"better_response": "Paris."})


NASTY = [
    '"', '\\"', "\\", "\n", " ", "*", "_", "#", "- ", "[", "[]", "[a]", "[!]", "{", '{"a":', '{"a', "```", "\n```\n",
    "`", "<think>", "</think>", "$", ",", ", ]", "\\n", "\\n ", "a: ", "a:\n", "[End]", "[End]\n", "[End] x\n",
    "\n---",    "---\n", "(Note: ", "Here is a better ", "better ", "\u200b", "''", "('", "{'",
    "1. ", ".", "\n\n", "\n \n", "<|x|>", "<answer>", "</answer>", "(", "| ", "= ", "Part 1 ", "# ... ", "<think a>",
]  # fmt: skip


@pytest.mark.parametrize("piece", NASTY, ids=repr)
def test_a_long_reply_of_one_piece_takes_no_time(piece: str) -> None:
    size = 10_000
    started = time.process_time()
    for text in (piece * (size // len(piece)), "a" + piece * (size // len(piece)) + "a"):
        check(text)
        for form in FORMS:
            check(whole(text, form, RESPONSE_CRITERIA, RESPONSE_SECTIONS))
    assert time.process_time() - started < 10, "some pattern is quadratic"


def test_every_reason_can_be_told_to_the_teacher() -> None:
    assert all(REPAIRABLE.values())


def test_half_an_emoji_is_replaced_in_texts_and_critique() -> None:
    values = dict.fromkeys([*RESPONSE_CRITERIA, *RESPONSE_SECTIONS], "\ud83d A clear text about the subject.")
    parsed = parse_reply(json.dumps(values), "stop", "json", RESPONSE_CRITERIA, RESPONSE_SECTIONS)
    assert isinstance(parsed, Parsed)
    for text in (*parsed.texts.values(), *parsed.critique.values()):
        assert text.encode().decode() == "\ufffd A clear text about the subject."
