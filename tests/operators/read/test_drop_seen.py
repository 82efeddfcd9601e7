"""Rows of an earlier refresh are dropped with a reason; nothing else changes, and nothing is lost."""

import pyarrow as pa
import pytest
import ray

from operators.columns import RAW, conform
from operators.read.drop_seen import SEEN, drop_seen


def rows(**outcomes: str) -> "ray.data.Dataset":
    table = pa.table({"row_id": list(outcomes), "outcome": list(outcomes.values())})
    return ray.data.from_arrow(conform(table, RAW))


@pytest.mark.usefixtures("local_ray")
def test_only_rows_that_were_taken_earlier_are_dropped() -> None:
    new = rows(a="", b="", c="", d="quarantined:too_long", e="dropped:held_out")
    earlier = rows(a="", b="quarantined:too_long", d="", e="dropped:held_out", z="").select_columns(
        ["row_id", "outcome"]
    )
    found = {row["row_id"]: row["outcome"] for row in drop_seen(new, earlier).take_all()}
    assert found == {"a": SEEN, "b": "", "c": "", "d": "quarantined:too_long", "e": SEEN}
