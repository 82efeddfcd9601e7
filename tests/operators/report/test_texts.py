import time

import pytest

from operators.report.texts import (
    DELETED,
    INSERTED,
    KEPT,
    count,
    decimal,
    duration,
    share,
    short,
    signed,
    visible,
    word_diff,
    words,
)


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("a\r\nb\rc", "a\nb[U+000D]c"),
        ("pay \u202e001\u202c now", "pay [U+202E]001[U+202C] now"),
        ("hid\u200bden \U000e0041", "hid[U+200B]den [U+E0041]"),
        ("\x00\x1b[2J\ufeff", "[U+0000][U+001B][2J[U+FEFF]"),
        ("👩\u200d💻 é नमस्ते", "👩\u200d💻 é नमस्ते"),
    ],
)
def test_invisible_characters_are_named(text: str, seen: str) -> None:
    assert visible(text) == seen


def test_insertions_and_deletions_rebuild_both_texts() -> None:
    before = "Name the two stages of photosynthesis in plants and say where each one happens."
    after = "Name the two stages of photosynthesis in algae, and say where each one happens first."
    parts = word_diff(before, after)
    old = "".join(text for kind, text in parts if kind != INSERTED)
    assert "".join(old.split()) == "".join(before.split())  # the space after a kept word is from the new text
    assert "".join(text for kind, text in parts if kind != DELETED) == after
    assert (DELETED, "plants ") in parts
    assert parts[0][0] == KEPT


def test_a_text_that_only_grew_is_shown_in_line_however_much_was_added() -> None:
    parts = word_diff("Give tips for saving money", "Give tips for saving money" + " to one more person" * 40)
    assert [kind for kind, _ in parts] == [KEPT, INSERTED]


def test_texts_that_share_only_scattered_words_are_not_interleaved() -> None:
    assert word_diff("1. Spend less\n2. Save more", "1. Budget first.\n2. Keep a buffer of a month, no less.") == ()


def test_a_short_run_between_two_changes_joins_them() -> None:
    kept = "one two three four five six seven eight nine ten "
    parts = word_diff(kept + "red of blue", kept + "green of black")
    assert [kind for kind, _ in parts] == [KEPT, DELETED, INSERTED]


def test_equal_and_empty_texts() -> None:
    assert word_diff("same words here", "same words here") == ((KEPT, "same words here"),)
    assert word_diff("", "") == ()
    assert word_diff("", "new") == ((INSERTED, "new"),)


def test_texts_made_to_be_slow_are_given_up() -> None:
    started = time.monotonic()
    assert word_diff("a b " * 50_000, "b a " * 50_000) == ()
    word_diff("a b " * 600, "b a " * 600)
    assert time.monotonic() - started < 60  # quadratic in 100,000 words would take hours


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (count(1234567.4), "1,234,567"),
        (count(None), "–"),
        (decimal(0.12345), "0.123"),
        (decimal(None), "–"),
        (short(123456.0), "1.235e+05"),
        (signed(-0.12345), "−0.123"),
        (signed(0.5, 1), "+0.5"),
        (signed(None), "–"),
        (share(1, 3), "33\u202f%"),
        (share(1, 0), "–"),
        (duration(59.94), "59.9 s"),
        (duration(125), "2 min 5 s"),
        (duration(3660), "1 h 1 min"),
        (duration(None), "–"),
        (words("quarantined:too_long"), "quarantined: too long"),
    ],
)
def test_numbers_and_names_as_a_person_reads_them(said: str, expected: str) -> None:
    assert said == expected
