"""The set of settled keys, which keeps keys in a set and in an array."""

import pytest

from operators.teacher import settled
from operators.teacher.settled import SettledKeys


@pytest.mark.parametrize("fewest_sorted_in", [1, 3, 10_000])
def test_it_holds_the_keys_that_were_added_and_no_other(monkeypatch: pytest.MonkeyPatch, fewest_sorted_in: int) -> None:
    monkeypatch.setattr(settled, "FEWEST_SORTED_IN", fewest_sorted_in)
    keys = SettledKeys()
    assert "0" not in keys
    for number in range(0, 200, 2):
        keys.add(str(number))
        keys.add(str(number))
    assert [number for number in range(200) if str(number) in keys] == list(range(0, 200, 2))
