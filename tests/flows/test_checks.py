"""Over all refreshes together, every row is kept by exactly one."""

import pyarrow as pa
import pytest

from flows.checks import _homeless
from operators.read.drop_seen import SEEN

DROPPED, QUARANTINED, COPY = "dropped:near_duplicate", "quarantined:too_long", "dropped:duplicate"


@pytest.mark.parametrize(
    ("outcomes", "lost", "doubled"),
    [
        (["", SEEN], 0, 0),
        (["original", SEEN, SEEN], 0, 0),
        ([DROPPED, SEEN], 0, 0),
        (["dropped:held_out", SEEN], 0, 0),
        ([QUARANTINED, ""], 0, 0),
        ([QUARANTINED, QUARANTINED], 0, 0),
        ([COPY, COPY], 0, 0),
        ([SEEN, SEEN], 1, 0),
        ([SEEN, QUARANTINED], 1, 0),
        (["", ""], 0, 1),
        (["", "dropped:held_out"], 0, 1),
    ],
)
def test_a_row_that_none_keeps_is_lost_and_one_that_two_keep_is_doubled(
    outcomes: list[str], lost: int, doubled: int
) -> None:
    rows = pa.table({"row_id": ["a"] * len(outcomes), "outcome": outcomes})
    assert _homeless(rows).to_pylist() == [{"lost": lost, "doubled": doubled}]


def test_a_block_of_the_shuffle_may_be_empty() -> None:
    assert _homeless(pa.table({})).to_pylist() == [{"lost": 0, "doubled": 0}]
