"""Names of columns that occur twice."""

import pytest

from operators.read.record import distinct


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([], []),
        (["a", "b"], ["a", "b"]),
        (["a", "a", "b", "a"], ["a", "a (2)", "b", "a (3)"]),
        (["a", "a", "a (2)"], ["a", "a (3)", "a (2)"]),
        (["", ""], ["", " (2)"]),
    ],
)
def test_the_first_of_a_name_keeps_it_and_all_names_differ(names: list[str], found: list[str]) -> None:
    assert list(distinct(names)) == found


def test_equal_keys_cost_as_much_as_others() -> None:
    assert distinct(["a"] * 200_000)[-1] == "a (200000)"  # comparing each name with all others would take hours
