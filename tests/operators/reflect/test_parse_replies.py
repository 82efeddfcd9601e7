"""Every way in which a teacher's reply can be unusable has a name, and nothing half-parsed gets through."""

import json

import pytest

from operators.reflect.parse_replies import Parsed, Rejected, parse_reply
from operators.reflect.prompts import INSTRUCTION_CRITERIA, INSTRUCTION_SECTIONS, RESPONSE_CRITERIA, RESPONSE_SECTIONS

CRITIQUE = "\n".join(f"{name.replace('_', ' ')}: fine" for name in RESPONSE_CRITERIA)


def delimited(answer: str, critique: str = CRITIQUE, end: str = "\n[End]") -> str:
    return f"[Critique]\n{critique}\n[Better Answer]\n{answer}{end}"


def parse_delimited(reply: str | None, finish_reason: str = "stop") -> Parsed | Rejected:
    return parse_reply(reply, finish_reason, "delimited", RESPONSE_CRITERIA, RESPONSE_SECTIONS)


def parse_json(reply: str | None, finish_reason: str = "stop") -> Parsed | Rejected:
    return parse_reply(reply, finish_reason, "json", RESPONSE_CRITERIA, RESPONSE_SECTIONS)


def as_json(**changes: object) -> str:
    return json.dumps(dict.fromkeys(RESPONSE_CRITERIA, "fine") | {"better_response": "Paris."} | changes)


class TestDelimited:
    def test_reads_critique_and_answer(self) -> None:
        parsed = parse_delimited(delimited("Paris."))
        assert parsed == Parsed(dict.fromkeys(RESPONSE_CRITERIA, "fine"), {"better_response": "Paris."})

    def test_an_answer_that_starts_with_the_closing_word_is_whole(self) -> None:
        answer = "The Endocrine system.\nEnd of story, [End] of line."
        parsed = parse_delimited(delimited(answer))
        assert isinstance(parsed, Parsed)
        assert parsed.texts["better_response"] == answer

    @pytest.mark.parametrize(
        ("reply", "reason"),
        [
            (None, "call_failed"),
            ("", "missing_section"),
            ("Paris.", "missing_section"),
            (delimited("Paris.", end=""), "missing_section"),
            (delimited("[Better Answer]\nParis."), "repeated_heading"),
            (delimited("Paris.", critique=f"{CRITIQUE}\n[Better Answer]"), "repeated_heading"),
            (delimited("Paris.") + "\nAnd more.", "text_after_end"),
            (delimited("", end="[End]"), "empty_section"),
            (delimited("Paris.", critique="helpfulness: fine"), "missing_criterion"),
            (f"[Better Answer]\nParis.\n[Critique]\n{CRITIQUE}\n[End]", "sections_out_of_order"),
            ("I'm sorry, but I can't help with that.", "refusal"),
        ],
    )
    def test_refuses(self, reply: str | None, reason: str) -> None:
        assert parse_delimited(reply) == Rejected(reason)

    def test_a_reply_cut_off_by_the_limit_is_told_apart(self) -> None:
        assert parse_delimited(delimited("Paris", end=""), "length") == Rejected("cut_off")


class TestJson:
    def test_reads_critique_and_answer(self) -> None:
        parsed = parse_json(as_json())
        assert parsed == Parsed(dict.fromkeys(RESPONSE_CRITERIA, "fine"), {"better_response": "Paris."})

    @pytest.mark.parametrize(
        ("reply", "reason"),
        [
            ("{", "no_json"),
            ("[1]", "no_json"),
            ("[" * 100_000, "no_json"),
            (as_json(better_response=7), "missing_section"),
            (as_json(helpfulness=None), "missing_section"),
            (as_json(better_response="  "), "empty_section"),
            ("I cannot do that.", "refusal"),
        ],
    )
    def test_refuses(self, reply: str, reason: str) -> None:
        assert parse_json(reply) == Rejected(reason)

    def test_endless_white_space_is_a_cut_off_reply(self) -> None:
        assert parse_json('{"helpfulness": "fine",' + " " * 5000, "length") == Rejected("cut_off")


def test_a_new_instruction_without_its_answer_is_refused() -> None:
    reply = json.dumps(dict.fromkeys(INSTRUCTION_CRITERIA, "fine") | {"better_instruction": "Name a river."})
    assert parse_reply(reply, "stop", "json", INSTRUCTION_CRITERIA, INSTRUCTION_SECTIONS) == Rejected("missing_section")
