"""The mixture of newest rows, replayed rows and general data depends on ids alone, and every row is counted."""

from typing import Any

import pyarrow as pa
import pytest
import ray

from operators.columns import ORIGINAL, RAW, RECYCLED, conform
from operators.train.mixture import (
    COLUMNS,
    GENERAL,
    NOT_REPLAYED,
    MixtureConfig,
    general_rows,
    is_drawn,
    is_general,
    replayed,
)
from operators.train.pack import PackConfig, Packer, count_packed


def recycled(count: int) -> pa.Table:
    ids = [f"{number:032x}" for number in range(count)]
    texts = {"final_instruction": ["Say hello."] * count, "final_response": ["Hello."] * count, "input": [""] * count}
    outcomes = [ORIGINAL] * (count - 1) + ["dropped:near_duplicate"]
    return conform(pa.table({"row_id": ids, "outcome": outcomes, **texts}), RECYCLED)


def table_of(rows: "ray.data.Dataset") -> pa.Table:
    return pa.concat_tables(ray.get(rows.to_arrow_refs()))


def test_a_share_is_drawn_by_id_and_draw_alone() -> None:
    ids = [f"{number:032x}" for number in range(20_000)]
    monday, tuesday = ({row_id for row_id in ids if is_drawn(row_id, 0.1, day)} for day in ("monday", "tuesday"))
    assert 1_800 < len(monday) < 2_200
    assert 120 < len(monday & tuesday) < 280, "drawn anew"
    assert monday < {row_id for row_id in ids if is_drawn(row_id, 0.2, "monday")}
    assert not any(is_drawn(row_id, 0.0, "x") for row_id in ids)
    assert all(is_drawn(row_id, 1.0, "x") for row_id in ids)


@pytest.mark.usefixtures("local_ray")
def test_earlier_rows_that_are_not_drawn_stay_with_their_reason() -> None:
    rows = recycled(400)
    found = table_of(replayed(ray.data.from_arrow(rows), MixtureConfig(earlier=0.25), "monday"))
    assert found.schema.names == list(COLUMNS)
    assert sorted(found["row_id"].to_pylist()) == rows["row_id"].to_pylist()
    outcomes = dict(zip(found["row_id"].to_pylist(), found["outcome"].to_pylist(), strict=True))
    assert 60 < list(outcomes.values()).count(ORIGINAL) < 140
    assert outcomes[rows["row_id"][399].as_py()] == "dropped:near_duplicate", "its own outcome stays"
    assert list(outcomes.values()).count(NOT_REPLAYED) == 399 - list(outcomes.values()).count(ORIGINAL)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("available", "least", "most"), [(1000, 70, 155), (50, 50, 50)])
def test_general_data_is_a_share_of_all_rows_as_far_as_there_are_so_many(available: int, least: int, most: int) -> None:
    values: dict[str, Any] = {
        "row_id": [f"{number:032x}" for number in range(available + 1)],
        "instruction": ["What is a cell?"] * (available + 1),
        "response": ["The smallest unit of life."] * (available + 1),
        "outcome": [""] * available + ["quarantined:too_long"],
    }
    raw = ray.data.from_arrow(conform(pa.table(values), RAW))
    found = table_of(general_rows(raw, MixtureConfig(general="x", general_share=0.1), 1000, "monday"))
    assert least <= found.num_rows <= most
    assert found.schema.names == list(COLUMNS)
    assert all(is_general(row_id) for row_id in found["row_id"].to_pylist())
    assert set(found["outcome"].to_pylist()) == {ORIGINAL}
    assert found["final_response"][0].as_py() == "The smallest unit of life."


def test_packs_hold_every_row_once_and_name_those_that_are_not_replayed(demo_model: str) -> None:
    rows = recycled(6).to_pylist()
    rows[0]["outcome"], rows[1]["row_id"] = NOT_REPLAYED, f"{GENERAL}7"
    packs = Packer(PackConfig(max_tokens=256), demo_model)(pa.Table.from_pylist(rows, schema=RECYCLED))
    ids = [row_id for row_ids in packs["row_ids"].to_pylist() for row_id in row_ids]
    assert sorted(ids) == sorted(row["row_id"] for row in rows[:5])
    outcomes = dict(zip(map(tuple, packs["row_ids"].to_pylist()), packs["outcome"].to_pylist(), strict=True))
    assert outcomes[(rows[0]["row_id"],)] == NOT_REPLAYED


@pytest.mark.usefixtures("local_ray")
def test_rows_of_general_data_are_counted_apart(demo_model: str) -> None:
    rows = recycled(6).to_pylist()
    rows[1]["row_id"] = f"{GENERAL}7"
    packs = Packer(PackConfig(max_tokens=256), demo_model)(pa.Table.from_pylist(rows, schema=RECYCLED))
    counted = count_packed(ray.data.from_arrow(packs))
    assert (counted["rows"], counted["general_rows"]) == (5, 1)


def test_a_mixture_that_is_not_set_leaves_older_packs_valid() -> None:
    assert "mixture" not in PackConfig().identity()
    assert PackConfig(mixture=MixtureConfig(earlier=0.1)).identity()["mixture"]["earlier"] == 0.1
