import json
from typing import Any

import pyarrow as pa
import pytest

from operators.columns import RECYCLED
from operators.report.pairs import MAX_CRITERIA, cut_critique, cut_text, draw_pairs, lowest


def rows_of(ids: list[str], outcome: str = "both") -> pa.Table:
    row: dict[str, Any] = {"outcome": outcome, "instruction": "a long instruction", "ifd_original": float("nan")}
    return pa.Table.from_pylist([row | {"row_id": row_id} for row_id in ids], schema=RECYCLED)


def test_a_draw_over_blocks_is_the_draw_over_all_rows() -> None:
    ids = [f"r{number}" for number in range(50)]
    whole = draw_pairs(rows_of(ids), 4, 10, seed=0)["both"]
    parts = [draw_pairs(rows_of(ids[start : start + 7]), 4, 10, seed=0)["both"] for start in range(0, 50, 7)]
    assert lowest([draw for part in reversed(parts) for draw in part], 4) == whole
    assert [pair["row_id"] for _, _, pair in whole] != ids[:4]
    other = draw_pairs(rows_of(ids), 4, 10, seed=1)["both"]
    assert [pair["row_id"] for _, _, pair in other] != [pair["row_id"] for _, _, pair in whole]


def test_outcomes_are_drawn_apart_and_scores_are_finite_or_none() -> None:
    drawn = draw_pairs(pa.concat_tables([rows_of(["a"]), rows_of(["b"], "original"), rows_of(["c"], "x:y")]), 3, 10, 0)
    assert {outcome: [pair["row_id"] for _, _, pair in pairs] for outcome, pairs in drawn.items()} == {
        "original": ["b"],
        "instruction": [],
        "response": [],
        "both": ["a"],
    }
    pair = drawn["both"][0][2]
    assert pair["ifd_original"] is None
    assert pair["instruction"] == {"text": "a long ins", "num_chars": 18}


@pytest.mark.parametrize(
    ("critique", "read"),
    [
        (None, {}),
        ("", {}),
        ("no JSON", {"critique": cut_text("no JSON", 5)}),
        ("[1]", {"critique": cut_text("[1]", 5)}),
        ('{"depth": 3}', {"depth": cut_text("3", 5)}),
    ],
)
def test_a_critique_is_read_whatever_it_is(critique: str | None, read: dict[str, Any]) -> None:
    assert cut_critique(critique, 5) == read


def test_a_critique_of_many_criteria_is_cut() -> None:
    assert len(cut_critique(json.dumps({str(number): "x" for number in range(100)}), 5)) == MAX_CRITERIA
