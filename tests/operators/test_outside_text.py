"""No text from outside can make a writer fail, and damage by control characters is named."""

import json

import pytest

from operators.outside_text import control_character, replace_surrogates


def test_half_an_emoji_becomes_the_replacement_character() -> None:
    assert replace_surrogates(json.loads('"a \\ud83d b"')) == "a \ufffd b"
    assert replace_surrogates("\ude00\ud83d") == "\ufffd\ufffd"  # the halves in the wrong order


def test_whole_emoji_and_any_other_text_stay_byte_identical() -> None:
    for text in ("", "plain", json.loads('"\\ud83d\\ude00"'), "\u4f60\u597d\n\t\x00"):
        assert replace_surrogates(text) == text


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("", None),
        ("a\n\tb \u00a0\u2028\ufeff", None),
        ("a\x00", "U+0000 null"),
        (json.loads('"$\\frac{1}{2}$"'), "U+000C form feed"),
        (json.loads('"\\beta\\f"'), "U+0008 backspace"),
        ("a\r\n", "U+000D carriage return"),
        ("\x1b[31mred", "U+001B escape"),
        ("\x7f", "U+007F delete"),
        ("don\x92t", "U+0092 control character"),
        ("\x9f", "U+009F control character"),
    ],
)
def test_the_first_control_character_is_named(text: str, name: str | None) -> None:
    assert control_character(text) == name
