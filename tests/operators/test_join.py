"""Rows of one key meet in one block, however many blocks there are."""

from collections import Counter

import pyarrow as pa
import pytest
import ray

from operators.join import add_up, group_by_key

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_a_key_lies_in_one_block_only(num_blocks: int) -> None:
    keys = [f"key {n % 7}" for n in range(40)]
    rows = ray.data.from_arrow([pa.table({"key": keys[start : start + 10]}) for start in range(0, 40, 10)])
    blocks = [ray.get(block) for block in group_by_key(rows, "key", num_blocks).to_arrow_refs()]
    seen = [Counter(block["key"].to_pylist()) for block in blocks if block.num_rows]
    assert sum(seen, Counter()) == Counter(keys)
    assert sum(len(each) for each in seen) == 7
    assert len(blocks) == num_blocks


def test_totals_over_blocks_and_over_none() -> None:
    sums = ray.data.from_arrow(
        [pa.table({"rows": [2, None], "tokens": [1, 1]}), pa.table({"rows": [3], "tokens": [0]})]
    )
    assert add_up(sums, ["rows", "tokens"]) == {"rows": 5, "tokens": 2}
    assert add_up(sums.filter(lambda row: False), ["rows"]) == {"rows": 0}
