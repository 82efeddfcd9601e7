import json
import math
from collections import Counter
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pytest
import ray

from operators import columns
from operators.report.collected import Collected
from operators.report.figures import WORD_EDGES, ReportConfig, bin_counts, collect_figures, median_of_counts

REPORT = ReportConfig(num_pairs=2, max_chars=10)

# outcome, instruction, response, final instruction, final response, IFD original, IFD better, r-IFD selected
ROWS: list[tuple[Any, ...]] = [
    ("both", "one two", "a b c", "one two three four", "a b c d e f", 0.5, 0.99, 1.2),
    ("both", "one", "a", "one two three", "a b", 0.75, math.nan, 0.4),
    ("original", "one two three", "a b", "one two three", "a b", None, 1.0, math.inf),
    ("response", "one", "a b c d", "one", "a b", 2.5, None, None),
    ("quarantined:empty", "", "", None, None, None, None, None),
    ("quarantined:empty", "", "", None, None, None, None, None),
    ("quarantined:long", "x", "y", None, None, None, None, None),
    ("dropped:held_out", "x y z", "y", None, None, None, None, None),
]


def recycled_row(row_id: str, row: tuple[Any, ...]) -> dict[str, Any]:
    outcome, instruction, response, final_instruction, final_response, original, better, selected = row
    return {
        "row_id": row_id,
        "instruction": instruction,
        "input": "",
        "response": response,
        "origin": "a.jsonl",
        "escaped": outcome == "both",
        "outcome": outcome,
        "better_instruction": None if better is None else "rewritten",
        "instruction_critique": '{"ambiguity": "which one of them?", "depth": 3}' if outcome == "both" else None,
        "instruction_reflection": "parsed" if outcome == "both" else None,
        "ifd_original": original,
        "ifd_better_instruction": better,
        "ifd_unscored": "original:over_long,better_instruction:over_long" if outcome == "original" else None,
        "selected_instruction": final_instruction,
        "rifd_selected": selected,
        "final_instruction": final_instruction,
        "final_response": final_response,
    }


def recycled_table(rows: list[tuple[Any, ...]] = ROWS) -> pa.Table:
    records = [recycled_row(f"row{at}", row) for at, row in enumerate(rows)]
    return pa.Table.from_pylist(records, schema=columns.RECYCLED)


def packs_table() -> pa.Table:
    def pack(lengths: list[int], row_ids: list[str], outcome: str = columns.PACKED) -> dict[str, Any]:
        num_tokens = sum(lengths)
        return {
            "input_ids": [1] * num_tokens,
            "labels": [-100] * (num_tokens // 2) + [1] * (num_tokens - num_tokens // 2),
            "position_ids": [0] * num_tokens,
            "document_lengths": lengths,
            "row_ids": row_ids,
            "outcome": outcome,
        }

    packs = [pack([10, 6], ["row0", "row1"]), pack([9], ["row2"]), pack([], ["row3"], "quarantined:over_long")]
    return pa.Table.from_pylist(packs, schema=columns.PACKS)


@pytest.fixture(scope="module")
def figures(local_ray: None) -> Collected:
    table = recycled_table()
    recycled = ray.data.from_arrow([table.slice(0, 3), table.slice(3, 1), table.slice(4)])
    return collect_figures(recycled, ray.data.from_arrow(packs_table()), REPORT)


def test_rows_are_counted_by_outcome_and_reason(figures: Collected) -> None:
    assert asdict(figures.rows) == {
        "source": 8,
        "quarantined": {"empty": 2, "long": 1},
        "dropped": {"held_out": 1},
        "recycled": {"original": 1, "instruction": 0, "response": 1, "both": 2},
        "active": 0,
        "escaped": 2,
        "packed": 3,
        "unpacked": {"quarantined:over_long": 1},
    }
    assert figures.reflections == {"instruction_reflection": {"parsed": 2}, "response_reflection": {}}


def test_lengths_are_words_of_recycled_rows_only(figures: Collected) -> None:
    instruction, response = figures.lengths["instruction"], figures.lengths["response"]
    assert instruction.before[:5] == [0, 2, 1, 1, 0]  # 2, 1, 3, 1 words
    assert instruction.after[:5] == [0, 1, 0, 2, 1]  # 4, 3, 3, 1 words
    assert (instruction.median_before, instruction.median_after) == (1.5, 3.0)
    assert (response.median_before, response.median_after) == (2.5, 2.0)
    assert sum(response.after) == 4


def test_scores_are_binned_and_what_is_not_finite_is_unscored(figures: Collected) -> None:
    original, better = figures.scores["ifd_original"], figures.scores["ifd_better_instruction"]
    assert (original.scored, original.unscored, original.below_one) == (3, 1, 2)
    assert original.mean == pytest.approx((0.5 + 0.75 + 2.5) / 3)
    assert {original.edges[at]: n for at, n in enumerate(original.counts) if n} == {0.5: 1, 0.75: 1, 2.0: 1}
    assert (better.scored, better.unscored, better.below_one) == (2, 1, 1)  # 1.0 itself is not below
    assert original.unscored_reasons == better.unscored_reasons == {"over_long": 1}
    assert figures.scores["rifd_selected"].unscored == 2
    assert figures.scores["rifd_better_response"].unscored == 0  # there was no text to score


def test_packing(figures: Collected) -> None:
    packing = figures.packing
    assert packing is not None
    assert (packing.packs, packing.documents, packing.tokens, packing.supervised_tokens) == (2, 3, 25, 13)
    assert (packing.longest_pack, packing.document_tokens.median) == (16, 9.0)
    assert sum(packing.document_tokens.counts) == 3


def test_pairs_are_cut_with_a_note(figures: Collected) -> None:
    pairs = {pair["row_id"]: pair for pair in figures.pairs}
    assert set(pairs) == {"row0", "row1", "row2", "row3"}
    assert pairs["row0"]["final_instruction"] == {"text": "one two th", "num_chars": 18}
    assert pairs["row0"]["instruction_critique"] == {
        "ambiguity": {"text": "which one ", "num_chars": 18},
        "depth": {"text": "3", "num_chars": 1},
    }
    assert pairs["row1"]["ifd_better_instruction"] is None


def test_neither_blocks_nor_their_order_change_a_figure(local_ray: None) -> None:
    table = recycled_table([(("both", "original")[at % 2], *ROWS[0][1:]) for at in range(40)])
    whole = collect_figures(ray.data.from_arrow(table), None, REPORT)
    pieces = [table.slice(at, 7) for at in range(0, 40, 7)][::-1]
    assert collect_figures(ray.data.from_arrow(pieces), None, REPORT) == whole
    assert Counter(pair["outcome"] for pair in whole.pairs) == {"both": 2, "original": 2}
    other = collect_figures(ray.data.from_arrow(table), None, REPORT.model_copy(update={"seed": 1}))
    assert [pair["row_id"] for pair in other.pairs] != [pair["row_id"] for pair in whole.pairs]


def test_no_rows_and_no_stage_give_zeros(local_ray: None) -> None:
    empty = collect_figures(ray.data.from_arrow(recycled_table([])), ray.data.from_arrow(packs_table()[:0]), REPORT)
    absent = collect_figures(None, None, REPORT)
    assert empty.rows == absent.rows
    assert empty.packing is not None
    assert (empty.packing.packs, absent.packing, absent.as_figures()["packing"]) == (0, None, {})
    json.dumps([empty.as_figures(), absent.as_figures()], allow_nan=False)


def test_perplexities_have_their_own_axis(local_ray: None) -> None:
    rows = [("both", "one", "a", "one", "a", 37.0, 5000.0, None)]
    scores = collect_figures(ray.data.from_arrow(recycled_table(rows)), None, REPORT, policy="perplexity").scores
    original = scores["ifd_original"]
    assert {original.edges[at]: n for at, n in enumerate(original.counts) if n} == {32: 1}
    assert scores["ifd_better_instruction"].counts[-1] == 1
    assert (original.measure, original.below_one) == ("perplexity", None)


def test_a_missing_column_is_named(local_ray: None) -> None:
    with pytest.raises(ValueError, match="report: columns outcome are missing"):
        collect_figures(ray.data.from_arrow(recycled_table().drop_columns(["outcome"])), None, REPORT)


def test_bins_are_closed_below_and_open_at_the_end() -> None:
    counts = bin_counts(Counter({"0": 1, "1": 2, "5": 3, "6": 4, "99999": 5}), WORD_EDGES)
    assert {edge: n for edge, n in zip(WORD_EDGES, counts, strict=True) if n} == {0: 1, 1: 2, 4: 3, 6: 4, 2048: 5}


@pytest.mark.parametrize(
    ("counts", "median"), [({}, None), ({"3": 1}, 3.0), ({"10": 1, "2": 1}, 6.0), ({"1": 1, "7": 5, "9": 5}, 7.0)]
)
def test_the_median_of_counts_is_exact(counts: dict[str, int], median: float | None) -> None:
    assert median_of_counts(Counter(counts)) == median
