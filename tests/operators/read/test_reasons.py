"""Every reason that a reader gives has a text that says how to fix it."""

import re
from pathlib import Path

from operators.read import read_instructions
from operators.read.reasons import CURES, MOST_CURED, told


def test_every_documented_reason_has_a_cure_or_needs_none() -> None:
    documented = re.search(r"`quarantined:` \+ (.*?)\.\n", read_instructions.read_instructions.__doc__ or "", re.DOTALL)
    assert documented
    reasons = set(re.findall(r"[a-z]+_[a-z0-9_]+", documented[1]))
    assert CURES.keys() == reasons


def test_every_reason_in_the_code_of_the_room_is_documented() -> None:
    folder = Path(read_instructions.__file__).parent
    text = "".join(file.read_text() for file in folder.glob("*.py"))
    found = set(re.findall(r'reason="([a-z_]+)"|"([a-z_]+)"\)(?:,)?$', text, re.MULTILINE))
    named = {name for pair in found for name in pair if name in CURES}
    assert {"malformed_csv", "second_list", "missing_field", "too_long", "too_deep"} <= named


def test_the_most_frequent_come_first_and_all_are_named() -> None:
    assert told({"own_reason": 1, "too_long": 5}) == "too_long 5 (raise source.max_chars), own_reason 1"
    assert told({"clean_failed": 1}) == "clean_failed 1 (your step raised an error on it; --doctor shows the first one)"
    every = told(dict.fromkeys(CURES, 1))
    assert all(f"{reason} 1" in every for reason in CURES)
    assert every.count("(") == MOST_CURED
    assert told({}) == ""
