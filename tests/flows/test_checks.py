"""Over all refreshes together, every row is kept by exactly one; a source of bad rows alone is refused."""

import pyarrow as pa
import pytest

from cluster.manifest import Manifest
from flows.checks import _homeless, may_go_on
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
def test_a_row_kept_by_no_refresh_is_lost_and_one_kept_by_two_is_doubled(
    outcomes: list[str], lost: int, doubled: int
) -> None:
    rows = pa.table({"row_id": ["a"] * len(outcomes), "outcome": outcomes})
    assert _homeless(rows).to_pylist() == [{"lost": lost, "doubled": doubled}]


def test_a_block_of_the_shuffle_may_be_empty() -> None:
    assert _homeless(pa.table({})).to_pylist() == [{"lost": 0, "doubled": 0}]


@pytest.mark.parametrize(
    ("outcomes", "made_from", "goes_on"),
    [
        ({"": 1, QUARANTINED: 4}, {"files": [["a", "1"]]}, True),
        ({QUARANTINED: 4}, {"files": [["a", "1"]]}, False),
        ({QUARANTINED: 4}, {"files": [["a", "1"]], "retracted": [["b", "2"]]}, True),
        ({}, {"files": []}, True),
        ({SEEN: 2}, {"files": [["a", "1"]]}, True),
    ],
)
def test_bad_rows_alone_are_refused_unless_the_others_were_retracted(
    outcomes: dict[str, int], made_from: dict[str, list[list[str]]], goes_on: bool
) -> None:
    assert may_go_on(Manifest(fingerprint="", outcomes=outcomes, made_from=made_from)) is goes_on
