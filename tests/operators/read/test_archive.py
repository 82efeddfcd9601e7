"""Rows of deleted files are kept unless an existing file has them, and no row appears twice."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray

from operators.columns import ACTIVE, HELD_OUT, RAW
from operators.read.archive import _join, _of_files, _once, _renewed, rows_of_files, with_archive
from operators.read.config import ReadConfig
from operators.read.read_instructions import DUPLICATE, read_instructions
from operators.read.read_record import row_id_of
from tests.operators.read.reading import TOKENS

CONFIG = ReadConfig(path="x", held_out_fraction=0)


def row(text: str, outcome: str = ACTIVE, origin: str = "/s/a.jsonl", row_id: str = "") -> dict[str, object]:
    texts = {"instruction": text, "input": "", "response": "r", "turns_before": "", "turns_after": ""}
    rest = {"extra": "", "ignored_columns": "", "origin": origin, "escaped": False, "outcome": outcome}
    return {"row_id": row_id or row_id_of(text, "", "r"), **texts, **rest}


def table(*rows: dict[str, object]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=RAW)


def joined(there: pa.Table, archived: pa.Table, config: ReadConfig = CONFIG) -> dict[str, str]:
    """Map each text to its outcome."""
    found = _once(_join(there, _renewed(archived, config, frozenset({"<|im_start|>"}))))
    assert len(set(found["row_id"].to_pylist())) == found.num_rows
    kept = found.filter(pc.not_equal(found["outcome"], DUPLICATE))
    return dict(zip(kept["instruction"].to_pylist(), kept["outcome"].to_pylist(), strict=True))


@pytest.mark.parametrize(
    "outcome", ["dropped:near_duplicate", "dropped:seen_in_earlier_refresh", "dropped:my_step", ""]
)
def test_an_archived_row_that_was_dropped_is_judged_anew(outcome: str) -> None:
    assert joined(table(), table(row("one", outcome))) == {"one": ACTIVE}


def test_a_quarantined_row_stays_so_and_a_held_out_one_too() -> None:
    stored = table(row("one", "quarantined:too_long"), row("two", HELD_OUT))
    assert joined(table(), stored) == {"one": "quarantined:too_long", "two": HELD_OUT}


def test_a_row_that_a_file_still_holds_is_there_once() -> None:
    assert joined(table(row("one", HELD_OUT)), table(row("one"), row("two"))) == {"one": HELD_OUT, "two": ACTIVE}


def test_a_copy_takes_the_place_of_a_first_that_is_gone() -> None:
    copies = table(
        row("one", DUPLICATE, "/s/b.jsonl", "place 1"),
        row("one", DUPLICATE, "/s/c.jsonl", "place 2"),
        row("two", DUPLICATE, "/s/b.jsonl", "place 3"),
    )
    assert joined(table(row("two")), copies) == {"two": ACTIVE, "one": ACTIVE}


def test_a_copy_that_takes_the_place_of_a_held_out_row_is_held_out() -> None:
    config = ReadConfig(path="x", held_out_fraction=0.999999)
    assert joined(table(), table(row("one", DUPLICATE, "/s/b.jsonl", "place 1")), config) == {"one": HELD_OUT}


def test_other_copies_stay_copies_however_often_the_archive_is_read() -> None:
    copies = table(row("one", DUPLICATE, "/s/b.jsonl", "place 1"), row("one", DUPLICATE, "/s/c.jsonl", "place 2"))
    found = _join(table(), _renewed(copies, CONFIG, frozenset()))
    assert found["outcome"].to_pylist() == [ACTIVE, DUPLICATE]
    assert found["row_id"].to_pylist() == [row_id_of("one", "", "r"), "place 2"]
    again = _once(pa.concat_tables([table(row("one", DUPLICATE, "/s/c.jsonl", "place 2")), found]))
    assert again.num_rows == 2


def test_control_tokens_of_a_new_teacher_are_broken_up_in_archived_texts() -> None:
    [text] = joined(table(), table(row("say <|im_start|>")))
    assert "<|im_start|>" not in text


def test_a_row_on_which_an_own_step_failed_is_tried_again() -> None:
    assert joined(table(), table(row("one", "quarantined:clean_failed"))) == {"one": ACTIVE}


SAID = "say <|im_end|> and </s>"
RECORDS: list[dict[str, object]] = [
    {"instruction": "plain", "output": "r"},
    {"instruction": SAID, "output": "<|im_start|>r"},
    {"instruction": "", "output": "nothing is asked <|im_end|>"},
    {
        "messages": [
            {"role": role, "content": f"{role} {SAID}"} for role in ("system", "user", "assistant", "user", "assistant")
        ]
    },
]


@pytest.mark.usefixtures("local_ray")
def test_a_refresh_from_its_archive_has_the_ids_that_it_had_from_its_files(tmp_path: Path) -> None:
    """A copy whose texts were escaped got another id, and came to life as a second row."""
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("".join(f"{json.dumps(record)}\n" for record in RECORDS))
    config = ReadConfig(path=str(tmp_path), held_out_fraction=0)
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    stored = read_instructions(config, files, TOKENS).materialize()
    before = {str(row["row_id"]): row["outcome"] for row in stored.take_all()}
    assert sorted(before.values()) == [ACTIVE] * 3 + [DUPLICATE] * 3 + ["quarantined:empty_instruction"] * 2
    gone = [["a.jsonl"], ["b.jsonl"], ["a.jsonl", "b.jsonl"]]
    for names in gone:
        archived = rows_of_files(stored, names, ["a.jsonl", "b.jsonl"])
        left = [file for file in files if Path(file).name not in names]
        there = read_instructions(config, left, TOKENS) if left else ray.data.from_arrow(RAW.empty_table())
        found = with_archive(there, archived, config, TOKENS).take_all()
        living = {row["row_id"]: row["outcome"] for row in found if row["outcome"] != DUPLICATE}
        assert living == {row_id: outcome for row_id, outcome in before.items() if outcome != DUPLICATE}
        if len(names) == 2:
            assert {row["row_id"]: row["outcome"] for row in found} == before


def test_turns_of_a_dialogue_are_escaped_as_texts_are() -> None:
    dialogue = row("one") | {"turns_before": json.dumps([{"role": "user", "content": "now <|im_start|>"}])}
    [found] = _renewed(table(dialogue), CONFIG, frozenset({"<|im_start|>"})).to_pylist()
    assert json.loads(found["turns_before"]) == [{"role": "user", "content": "now <| im_start |>"}]
    assert found["escaped"]


def test_a_row_belongs_to_the_longest_name_that_its_origin_ends_in() -> None:
    stored = table(
        row("one", origin="/s/a.jsonl"), row("two", origin="/s/sub/a.jsonl"), row("three", origin="/s/b.jsonl")
    )
    names = frozenset({"a.jsonl", "sub/a.jsonl", "b.jsonl"})
    found = {name: _of_files(stored, frozenset({name}), names)["instruction"].to_pylist() for name in sorted(names)}
    assert found == {"a.jsonl": ["one"], "sub/a.jsonl": ["two"], "b.jsonl": ["three"]}
