import json
from typing import Any

import pyarrow as pa
import pytest

from operators.publish.pass_through import kinds_of, published_name, wider, with_pass_through


def extras(*objects: dict[str, Any] | None) -> pa.Table:
    return pa.table({"extra": pa.array(["" if one is None else json.dumps(one) for one in objects], pa.string())})


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        (None, "int", "int"),
        ("int", "int", "int"),
        ("int", "float", "float"),
        ("float", "int", "float"),
        ("int", "text", "json"),
        ("bool", "int", "json"),
        ("text", "json", "json"),
    ],
)
def test_the_narrowest_kind_that_holds_both(one: str | None, other: str, both: str) -> None:
    assert wider(one, other) == both


def test_columns_have_the_type_of_their_values_in_all_blocks(local_ray: None) -> None:
    import ray

    first = extras({"topic": "art", "score": 1, "good": True, "tags": ["a"], "mixed": 1, "big": 1 << 70})
    second = extras({"topic": "law", "score": 0.5, "mixed": "one"}, None, {"topic": None})
    rows = ray.data.from_arrow([first, second])
    kinds = kinds_of(rows, ["row_id"])
    assert kinds == {"big": "json", "good": "bool", "mixed": "json", "score": "float", "tags": "json", "topic": "text"}
    table = pa.concat_tables([first, second])
    made = with_pass_through(pa.table({"row_id": ["a", "b", "c", "d"]}), table["extra"], kinds, {"row_id"})
    assert made["topic"].to_pylist() == ["art", "law", None, None]
    assert made["score"].to_pylist() == [1.0, 0.5, None, None]
    assert made["good"].to_pylist() == [True, None, None, None]
    assert made["tags"].to_pylist() == ['["a"]', None, None, None]
    assert made["mixed"].to_pylist() == ["1", '"one"', None, None]
    assert made["big"].to_pylist() == [str(1 << 70), None, None, None]


def test_a_name_that_is_taken_gets_a_prefix_and_two_of_one_name_are_refused(local_ray: None) -> None:
    import ray

    assert published_name("outcome", {"outcome"}) == "source_outcome"
    assert published_name("topic", {"outcome"}) == "topic"
    clash = ray.data.from_arrow(extras({"outcome": 1, "source_outcome": 2}))
    with pytest.raises(ValueError, match="outcome and source_outcome have one name"):
        kinds_of(clash, ["outcome"])
    fine = ray.data.from_arrow(extras({"outcome": 1}))
    assert kinds_of(fine, ["outcome"]) == {"outcome": "int"}
