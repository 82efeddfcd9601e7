"""Properties of configs/demo.yaml that can be checked without running it: enough held-out rows, and no lost record."""

from collections import Counter
from pathlib import Path

import pytest

from cluster.runtime import REPOSITORY
from flows.config import load_config
from operators.read.read_instructions import read_instructions


@pytest.mark.usefixtures("local_ray")
def test_the_demo_holds_out_as_many_rows_as_a_release_needs() -> None:
    config = load_config(REPOSITORY / "configs" / "demo.yaml", [])
    rows = read_instructions(config.source, [config.source.path], frozenset())
    outcomes = Counter(row["outcome"] for row in rows.select_columns(["outcome"]).take_all())
    assert outcomes.keys() == {"", "dropped:held_out"}
    assert outcomes["dropped:held_out"] >= max(10, config.release.min_rows)
    assert outcomes.total() == len(Path(config.source.path).read_text().splitlines())
