"""Rows of one key meet in one block, however many blocks there are."""

from collections import Counter

import pyarrow as pa
import pytest
import ray

from operators.join import add_up, cogroup, group_by_key

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


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_the_rows_of_a_key_meet_in_one_call_with_their_own_columns(num_blocks: int) -> None:
    people = pa.schema([("id", pa.string()), ("name", pa.string()), ("born", pa.int32())])
    visits = pa.schema([("id", pa.string()), ("name", pa.string())])
    left = ray.data.from_arrow([pa.table({"id": ["a", "b"], "name": ["A", "B"]}), pa.table({"id": ["c"]})])
    right = ray.data.from_arrow([pa.table({"name": ["1", "2", "3"], "id": ["b", "z", "b"], "more": [0, 0, 0]})])

    def combine(rows: pa.Table, others: pa.Table) -> pa.Table:
        assert rows.schema == people
        assert others.schema == visits
        found = {key: sorted(r["name"] for r in others.to_pylist() if r["id"] == key) for key in rows["id"].to_pylist()}
        alone = [r["id"] for r in others.to_pylist() if r["id"] not in found]
        given = [f"{r['id']} {r['name']} {r['born']} {''.join(found[r['id']])}" for r in rows.to_pylist()]
        return pa.table({"said": pa.array([*given, *alone], pa.string())})

    both = cogroup((left, people), (right, visits), "id", num_blocks, combine)
    assert sorted(row["said"] for row in both.take_all()) == ["a A None ", "b B None 13", "c None None ", "z"]


def test_totals_over_blocks_and_over_none() -> None:
    sums = ray.data.from_arrow(
        [pa.table({"rows": [2, None], "tokens": [1, 1]}), pa.table({"rows": [3], "tokens": [0]})]
    )
    assert add_up(sums, ["rows", "tokens"]) == {"rows": 5, "tokens": 2}
    assert add_up(sums.filter(lambda row: False), ["rows"]) == {"rows": 0}
