"""Each boundary has the columns of the one before it, and tables are converted to a boundary's columns and types."""

from itertools import pairwise

import pyarrow as pa
import pytest

from operators import columns
from operators.columns import PACKS, RAW, RECYCLED, conform

BOUNDARIES = ("RAW", "INSTRUCTION_REFLECTED", "SELECTED", "RESPONSE_REFLECTED", "RECYCLED")


def test_a_row_keeps_its_columns_from_stage_to_stage() -> None:
    schemas = [getattr(columns, name) for name in BOUNDARIES]
    for earlier, later in pairwise(schemas):
        assert list(later)[: len(earlier)] == list(earlier)
        assert len(later) > len(earlier)
    assert len(set(RECYCLED.names)) == len(RECYCLED.names)
    assert PACKS.field("outcome").type == RAW.field("outcome").type


def test_a_table_gets_exactly_the_columns_of_a_schema() -> None:
    found = conform(pa.table({"more": [1], "outcome": [""], "row_id": pa.array(["a"], pa.large_string())}), RAW)
    assert found.schema == RAW
    assert found["row_id"].to_pylist() == ["a"]
    assert found["instruction"].null_count == 1


def test_a_column_of_another_kind_is_refused() -> None:
    with pytest.raises(pa.ArrowNotImplementedError):
        conform(pa.table({"escaped": [{"a": 1}]}), RAW)
