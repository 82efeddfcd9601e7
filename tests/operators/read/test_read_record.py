"""A record's texts have a canonical form, whatever its layout, and unusable records have a reason."""

import unicodedata

import pytest

from operators.read.config import ReadConfig
from operators.read.dialogues import Exchange, Turn
from operators.read.read_record import canonical, extract, row_id_of
from operators.read.record import Record

CONFIG = ReadConfig(path="x")


def pair_of(value: object, **settings: object) -> Exchange:
    (pair,) = extract(Record(0, value, ""), ReadConfig.model_validate({"path": "x", **settings})).exchanges
    return pair


def chat(*turns: tuple[str, str]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], "instruction": None}


def test_the_id_is_that_of_the_canonical_texts() -> None:
    assert row_id_of("a", "", "b") == "80c0a11e7167d941ba4a73b4da0b26ac"  # an id of the first release; rows keep theirs
    assert row_id_of("a", "", "b") != row_id_of("a", "b", "")
    assert row_id_of("a", "", "b") != row_id_of("a", "", "b", "[1]") != row_id_of("a", "", "b", "", "[1]")
    assert len(row_id_of("a", "", "b")) == 32
    assert pair_of({"instruction": " e\u0301\r\nx ", "output": "y"}).instruction == unicodedata.normalize("NFC", "é\nx")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("    x = 1\n    y = 2", "    x = 1\n    y = 2"),
        ("\n\n    total = x + y\n    return total\n\n", "    total = x + y\n    return total"),
        ("\treturn x", "\treturn x"),
        ("    return x", "    return x"),
        ("  - one\n  - two", "  - one\n  - two"),
        (" Hello\n world", "Hello\n world"),
        ("   An indented paragraph.\nThe rest of it.", "An indented paragraph.\nThe rest of it."),
        ("  Hello ", "Hello"),
        ("def f():\n    return 1\n", "def f():\n    return 1"),
        (" \n\t ", ""),
    ],
)
def test_only_code_keeps_its_leading_indentation(text: str, kept: str) -> None:
    assert canonical(text) == kept
    assert canonical(kept) == kept


@pytest.mark.parametrize(
    ("system_turn", "expected"),
    [
        ("keep", Exchange("Hi", "", "Ho", (Turn("system", "Be brief."),))),
        ("prepend", Exchange("Be brief.\n\nHi", "", "Ho")),
        ("quarantine", Exchange("Hi", "Be brief.", "Ho", (Turn("system", "Be brief."),), reason="system_turn")),
    ],
)
def test_a_system_prompt_is_kept_prepended_or_refused(system_turn: str, expected: Exchange) -> None:
    assert (
        pair_of(chat(("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho")), system_turn=system_turn) == expected
    )


def test_a_system_prompt_goes_before_the_first_user_of_a_long_dialogue() -> None:
    dialogue = chat(
        ("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho"), ("user", "So?"), ("assistant", "Well.")
    )
    prepended = pair_of(dialogue, system_turn="prepend")
    assert prepended.before == (Turn("user", "Be brief.\n\nHi"), Turn("assistant", "Ho"))
    assert prepended.instruction == "So?"


def test_a_system_prompt_without_text_is_none() -> None:
    for system_turn in ("keep", "prepend", "quarantine"):
        found = pair_of(chat(("system", " "), ("user", "Hi"), ("assistant", "Ho")), system_turn=system_turn)
        assert found == Exchange("Hi", "", "Ho")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (chat(("system", "x" * 40_000), ("user", "Hi"), ("assistant", "Ho")), "too_long"),
        (chat(("user", "a\x00"), ("assistant", "b"), ("user", "Hi"), ("assistant", "Ho")), "control_characters"),
        ({"instruction": "$\x0crac$", "output": "y"}, "control_characters"),
        ({"instruction": "half \ud83d", "output": "y"}, "control_characters"),
        ({"instruction": "don\x92t", "output": "y"}, "control_characters"),
        ({"instruction": "a\rb", "output": "y"}, ""),
        (chat(("user", "\u200b"), ("assistant", "b")), "empty_instruction"),
        ({"instruction": "x", "output": "nan"}, "empty_response"),
        (7, "not_an_object"),
    ],
)
def test_a_text_that_cannot_be_used_has_a_reason(value: object, reason: str) -> None:
    assert pair_of(value).reason == reason


def test_a_defect_of_the_file_is_the_reason_of_the_row() -> None:
    found = extract(Record(3, None, "cut", "malformed_json"), CONFIG)
    assert found == ([Exchange("cut", "", "", reason="malformed_json")], [])


def test_columns_that_a_table_left_out_are_named() -> None:
    assert extract(Record(0, {"instruction": "a", "output": "b"}, "", unread=("embedding",)), CONFIG).unread == [
        "embedding"
    ]


def test_a_record_that_is_nested_too_deep_is_a_row_too() -> None:
    value: object = {"role": "assistant", "text": "x"}
    for _ in range(3_000):
        value = {"role": "assistant", "text": "x", "replies": [value]}
    assert (
        pair_of({"prompt": {"role": "prompter", "text": "a", "replies": [{"text": "b"}, value]}}).reason == "too_deep"
    )
