"""Near-duplicates are found by similarity, independently of the order of rows, and nothing else is touched."""

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
from datasketch import MinHash

from operators.columns import RAW, conform
from operators.ngrams import runs, words
from operators.read.drop_near_duplicates import (
    NEAR_DUPLICATE,
    NUM_PARTS,
    PART_PERMUTATIONS,
    DeduplicateConfig,
    drop_near_duplicates,
    followers,
    label_of,
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


def records(*each: dict[str, str]) -> "ray.data.Dataset":
    """Rows of these columns; ids are numbers in their order."""
    empty = {"input": "", "turns_before": "", "turns_after": "", "outcome": ""}
    table = pa.Table.from_pylist([empty | one | {"row_id": f"{number:04}"} for number, one in enumerate(each)])
    return ray.data.from_arrow(conform(table, RAW))


def dropped(*each: dict[str, str]) -> int:
    found = outcomes(drop_near_duplicates(records(*each), None, DeduplicateConfig()))
    return list(found.values()).count(NEAR_DUPLICATE)


def slots(count: int, number: int) -> list[str]:
    """Different texts of so many words, which share no word with their neighbours."""
    return [" ".join(f"w{(number * 7 + at * 31) % 997}" for at in range(count)) for number in range(number)]


def test_a_label_is_compared_with_its_signs_and_without_case() -> None:
    assert label_of(" Positive. ") == label_of("positive") != label_of("negative")
    assert label_of("-5") != label_of("5")
    assert label_of("It is positive because the guests praise the beds.") == ""


def test_a_follower_resembles_a_row_that_stays_not_one_that_goes() -> None:
    """A chain a ~ b ~ c without a ~ c: b is dropped, and c stays because only b resembled it."""
    values = np.zeros(128 + NUM_PARTS * PART_PERMUTATIONS, np.uint8)
    values[:128] = np.random.default_rng(0).integers(0, 256, 128)
    b, c = values.copy(), values.copy()
    b[:20] += 1
    c[:40] += 1
    c[:20] += 1
    assert followers(np.stack([values, b, c]), 0.8) == [1]
    assert followers(np.stack([b, values, c]), 0.8) == [1]
    assert followers(np.stack([values, values, values]), 1.0) == [1, 2]
    for part in range(NUM_PARTS):  # the telling shingles agree, but another part does not
        other = values.copy()
        other[128 + part * PART_PERMUTATIONS :][:PART_PERMUTATIONS] += 1
        assert followers(np.stack([values, other]), 0.8) == []


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

    @pytest.mark.parametrize(("instruction_words", "input_words"), [(33, 3), (60, 6), (60, 10)])
    def test_distinct_rows_of_one_template_stay_and_copies_among_them_go(
        self, instruction_words: int, input_words: int
    ) -> None:
        """A case from an audit: 158, 180 and 42 of 200 such rows were dropped."""
        template = " ".join(f"task{n}" for n in range(instruction_words))
        labels = itertools.cycle(("positive", "negative", "neutral"))
        each = [
            {"instruction": template, "input": slot, "response": label}
            for slot, label in zip(slots(input_words, 200), labels, strict=False)
        ]
        assert dropped(*each) == 0
        as_prompt = [one | {"instruction": f"{template}: {one['input']}", "input": ""} for one in each]
        assert dropped(*as_prompt) == 0
        copies = [one | {"input": one["input"].upper() + " !"} for one in each[::50]]
        assert dropped(*each, *copies) == len(copies)

    def test_another_label_makes_another_record(self) -> None:
        pair = {"instruction": "Is the review good?", "input": WORDS, "response": "Yes."}
        assert dropped(pair, pair | {"response": "No."}) == 0
        assert dropped(pair, pair | {"response": "yes", "input": CHANGED_AT_THE_END}) == 1

    def test_dialogues_that_end_alike_stay(self) -> None:
        """A case from an audit: of 50 dialogues with different histories, 49 were dropped."""
        thanks = {"instruction": "Thank you!", "response": "You're welcome! Tell me if you have any other question."}
        histories = [
            [{"role": "user", "content": f"Say {a}?"}, {"role": "assistant", "content": a}] for a in slots(9, 50)
        ]
        each = [thanks | {"turns_before": json.dumps(turns)} for turns in histories]
        assert dropped(*each) == 0
        assert dropped(*each, thanks | {"turns_before": each[3]["turns_before"].replace("Say", "say")}) == 1
        after = [one | {"turns_before": "", "turns_after": one["turns_before"]} for one in each]
        assert dropped(*after) == 0

    def test_pairs_of_one_dialogue_and_branches_of_one_stay(self) -> None:
        turns = [{"role": "user", "content": text} for text in slots(40, 9)]
        grown = [
            {"instruction": f"And {slot}?", "response": f"Yes, {slot}.", "turns_before": json.dumps(turns[:length])}
            for length, slot in enumerate(slots(6, 9), start=1)
        ]
        assert dropped(*grown) == 0
        assert dropped(*(one | {"turns_before": grown[-1]["turns_before"]} for one in grown)) == 0

    def test_many_versions_of_a_record_with_a_long_answer_are_found(self) -> None:
        versions = [{"instruction": f"Word{n} {HALF}", "response": WORDS} for n in range(12)]
        assert dropped(*versions) == 11
        questions = [{"instruction": f"How do I {slot}?", "response": WORDS} for slot in slots(4, 12)]
        assert dropped(*questions) == 0  # one answer to different questions

    def test_rows_of_an_earlier_refresh_make_a_template_common(self) -> None:
        template = " ".join(f"task{n}" for n in range(60))
        each = [{"instruction": f"{template} {slot}", "response": "yes"} for slot in slots(4, 9)]
        earlier = records(*each[3:])
        new = records(*each[:2], each[5])
        found = outcomes(drop_near_duplicates(new, earlier, DeduplicateConfig()))
        assert found == {"0000": "", "0001": "", "0002": NEAR_DUPLICATE}


def _jaccard(one: str, other: str) -> float:
    cut = ([run.encode() for run in runs(words(f"{text}\n\nIt is so."), 3)] for text in (one, other))
    signatures = MinHash.bulk(cut, num_perm=256)
    return float(signatures[0].jaccard(signatures[1]))
