"""Near-duplicates are found by similarity, independently of the order of rows, and nothing else is touched."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
from datasketch import MinHash

from operators.columns import RAW, conform
from operators.read.drop_near_duplicates import (
    NEAR_DUPLICATE,
    DeduplicateConfig,
    drop_near_duplicates,
    followers,
    shingles,
)

WORDS = " ".join(f"word{n}" for n in range(60))
CHANGED_AT_THE_END = WORDS.replace("word59", "other")
HALF = " ".join(f"word{n}" if n < 30 else f"other{n}" for n in range(60))


def rows(*texts: tuple[str, str], outcome: str = "") -> "ray.data.Dataset":
    """Rows of (id, instruction), in that order."""
    table = pa.table(
        {
            "row_id": [row_id for row_id, _ in texts],
            "instruction": [text for _, text in texts],
            "input": [""] * len(texts),
            "response": ["It is so."] * len(texts),
            "outcome": [outcome] * len(texts),
        }
    )
    return ray.data.from_arrow(conform(table, RAW))


def outcomes(found: "ray.data.Dataset") -> dict[str, str]:
    return {row["row_id"]: row["outcome"] for row in found.take_all()}


def test_words_are_compared_without_case_and_punctuation() -> None:
    assert shingles("The Cat, sat; DOWN.", 3) == shingles("the cat sat down", 3) == [b"the cat sat", b"cat sat down"]
    assert shingles("One word", 3) == [b"one word"]
    assert shingles("!?", 3) == [b""]


def test_a_follower_resembles_a_row_that_stays_not_one_that_goes() -> None:
    """A chain a ~ b ~ c without a ~ c: b is dropped, and c stays because only b resembled it."""
    values = np.random.default_rng(0).integers(0, 256, 128).astype(np.uint8)
    b, c = values.copy(), values.copy()
    b[:20] += 1
    c[:40] += 1
    c[:20] += 1
    assert followers(np.stack([values, b, c]), 0.8) == [1]
    assert followers(np.stack([b, values, c]), 0.8) == [1]
    assert followers(np.stack([values, values, values]), 1.0) == [1, 2]


@pytest.mark.usefixtures("local_ray")
class TestDropNearDuplicates:
    def test_the_smallest_id_stays_whatever_the_order(self) -> None:
        texts = [("c", WORDS), ("a", CHANGED_AT_THE_END), ("b", HALF), ("d", "Name a river.")]
        for order in (texts, texts[::-1]):
            found = outcomes(drop_near_duplicates(rows(*order).repartition(2), None, DeduplicateConfig()))
            assert found == {"a": "", "b": "", "c": NEAR_DUPLICATE, "d": ""}

    def test_rows_of_an_earlier_refresh_stay_and_are_not_returned(self) -> None:
        new, earlier = rows(("a", WORDS), ("b", HALF)), rows(("z", CHANGED_AT_THE_END))
        assert outcomes(drop_near_duplicates(new, earlier, DeduplicateConfig())) == {"a": NEAR_DUPLICATE, "b": ""}

    def test_rows_with_an_outcome_neither_are_dropped_nor_cause_drops(self) -> None:
        held_out = rows(("a", WORDS), outcome="dropped:held_out")
        found = drop_near_duplicates(held_out.union(rows(("b", WORDS))), None, DeduplicateConfig())
        assert outcomes(found) == {"a": "dropped:held_out", "b": ""}

    def test_the_threshold_and_the_switch_are_obeyed(self) -> None:
        pair = rows(("a", WORDS), ("b", HALF))
        assert outcomes(drop_near_duplicates(pair, None, DeduplicateConfig(threshold=0.2)))["b"] == NEAR_DUPLICATE
        same = rows(("a", WORDS), ("b", WORDS))
        assert outcomes(drop_near_duplicates(same, None, DeduplicateConfig(near=False)))["b"] == ""

    def test_no_row_is_active(self) -> None:
        held_out = rows(("a", WORDS), outcome="dropped:held_out")
        assert outcomes(drop_near_duplicates(held_out, None, DeduplicateConfig())) == {"a": "dropped:held_out"}

    def test_no_rows_at_all(self) -> None:
        empty = ray.data.from_arrow(RAW.empty_table())
        assert outcomes(drop_near_duplicates(empty, None, DeduplicateConfig())) == {}

    def test_planted_duplicates_among_real_records_are_found_and_few_others(self, alpaca: Path) -> None:
        records = json.loads(alpaca.read_text())[:600]
        originals = {f"0{n:04}": f"{record['instruction']} {record['output']}" for n, record in enumerate(records)}
        long = {name: text for name, text in originals.items() if len(text.split()) > 60}
        planted = {f"1{name[1:]}": f"{text} Indeed." for name, text in long.items()}
        found = outcomes(drop_near_duplicates(rows(*originals.items(), *planted.items()), None, DeduplicateConfig()))
        dropped = {name for name, outcome in found.items() if outcome == NEAR_DUPLICATE}
        assert len(planted) > 0.15 * len(originals)
        assert len(dropped & planted.keys()) >= 0.98 * len(planted)
        for name in dropped - planted.keys():  # real near-duplicates among the records, confirmed by datasketch
            assert max(_jaccard(originals[name], text) for other, text in originals.items() if other < name) > 0.65


def _jaccard(one: str, other: str) -> float:
    signatures = MinHash.bulk([shingles(f"{text}\n\nIt is so.", 3) for text in (one, other)], num_perm=256)
    return float(signatures[0].jaccard(signatures[1]))
