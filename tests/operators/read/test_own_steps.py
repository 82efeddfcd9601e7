"""A custom function changes and drops rows; no row is lost, doubled or invented, and its source code is an input."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from operators.columns import RAW, conform
from operators.read.own_steps import (
    StepsConfig,
    apply_steps,
    as_returned,
    examine_steps,
    keep_every_row,
    load_function,
    map_rows,
)

MODULE = """
from ray.data import Dataset

def clean(row):
    if "spam" in row["instruction"]:
        return None
    if "long" in row["instruction"]:
        return "Too long!"
    if "bug" in row["instruction"]:
        raise RuntimeError("boom")
    if "empty" in row["instruction"]:
        return {**row, "response": " "}
    if "number" in row["instruction"]:
        return {**row, "response": 7}
    if "null" in row["instruction"]:
        return {**row, "response": "a\\0b"}
    return {**row, "row_id": "mine", "outcome": "original", "response": row["response"].upper() + "<|im_end|>."}

def as_if_all_rows(rows):
    return rows.map_batches(lambda batch: batch)

def shout(row):
    return [row["instruction"]]

def without_first(rows: Dataset) -> Dataset:
    return rows.filter(lambda row: row["row_id"] != "0")

def only_some_columns(rows: Dataset) -> Dataset:
    return rows.select_columns(["row_id", "response"])

def shouted(rows: Dataset) -> Dataset:
    return rows.map(lambda row: row | {"instruction": row["instruction"].upper()}).limit(1)
"""


def a_row(row_id: str, instruction: str, **changes: Any) -> dict[str, Any]:
    return {"row_id": row_id, "instruction": instruction, "input": "", "response": "yes", "outcome": "", **changes}


def table(*rows: dict[str, Any]) -> pa.Table:
    return conform(pa.Table.from_pylist(list(rows)), RAW)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"steps_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


def test_a_function_of_one_row_changes_texts_and_nothing_else(module: str) -> None:
    names = ("plain", "spam", "long", "bug", "empty", "number", "null")
    rows = table(*(a_row(name, name) for name in names), a_row("left", "spam", outcome="dropped:held_out"))
    found = map_rows(rows, load_function(f"{module}:clean"), "clean", frozenset()).to_pylist()
    assert {row["row_id"]: row["outcome"] for row in found} == {
        "plain": "",
        "spam": "dropped:clean",
        "long": "dropped:too_long",
        "bug": "quarantined:clean_failed",
        "empty": "quarantined:empty_response",
        "number": "quarantined:clean_failed",
        "null": "quarantined:control_characters",
        "left": "dropped:held_out",
    }
    assert found[0]["response"] == "YES<| im_end |>."


def test_rows_held_out_are_cleaned_like_the_others_but_not_dropped(module: str) -> None:
    """A case from an audit: evaluation saw texts that the step had not cleaned."""
    rows = table(*(a_row(name, name, outcome="dropped:held_out") for name in ("plain", "spam", "long", "bug", "empty")))
    found = map_rows(rows, load_function(f"{module}:clean"), "clean", frozenset()).to_pylist()
    assert [(row["response"], row["outcome"]) for row in found] == [
        ("YES<| im_end |>.", "dropped:held_out"),
        ("yes", "dropped:held_out"),
        ("yes", "dropped:held_out"),
        ("yes", "quarantined:clean_failed"),
        (" ", "quarantined:empty_response"),
    ]
    kept = keep_every_row(rows, as_returned(table(a_row("plain", "Plain!")), "clean"), "clean", frozenset()).to_pylist()
    assert [row["instruction"] for row in kept] == ["Plain!", "spam", "long", "bug", "empty"]
    assert {row["outcome"] for row in kept} == {"dropped:held_out"}


@pytest.mark.parametrize("reason", ["held out", "duplicate", "seen in earlier refresh"])
def test_a_reserved_reason_gets_a_prefix(reason: str) -> None:
    [row] = map_rows(table(a_row("a", "A")), lambda _: reason, "mine", frozenset()).to_pylist()
    assert row["outcome"] == f"dropped:step_{reason.replace(' ', '_')}"


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({"response": "10 %\r20 %"}, ""),  # possible in a source
        ({"turns_before": '[{"role": "system", "content": "Be brief."}]', "extra": '{"id": 1}'}, ""),
        ({"turns_before": "Be brief."}, "quarantined:mine_failed"),
        ({"turns_after": '["a"]'}, "quarantined:mine_failed"),
        ({"extra": "1"}, "quarantined:mine_failed"),
    ],
)
def test_texts_from_a_function_can_be_read_by_later_stages(changes: dict[str, str], outcome: str) -> None:
    rows = table(a_row("a", "A", turns_before="", turns_after="", extra=""))
    [found] = map_rows(rows, lambda row: {**row, **changes}, "mine", frozenset()).to_pylist()
    assert found["outcome"] == outcome


def test_a_function_that_fails_on_the_first_rows_is_found_before_a_run(module: str) -> None:
    def findings(*names: str, rows: tuple[str, ...] = ("plain", "spam", "bug")) -> list[tuple[str, bool]]:
        config = StepsConfig(functions=tuple(f"{module}:{name}" for name in names))
        return [(each.text, each.fatal) for each in examine_steps(config, [a_row(name, name) for name in rows])]

    [(text, fatal)] = findings("clean", "without_first")
    assert text.startswith(f"{module}:clean raises RuntimeError on 1 of the first 3 rows; it gets one row, a dict")
    assert not fatal
    [(text, fatal)] = findings("as_if_all_rows")
    assert "raises AttributeError: 'dict' object has no attribute 'map_batches' on 3 of the first 3 rows" in text
    assert fatal
    [(text, fatal)] = findings("shout", "clean")
    assert "it returned list" in text
    assert fatal
    assert findings("clean", rows=("plain", "spam")) == []
    assert findings("clean", rows=()) == []


def test_a_row_that_does_not_come_back_is_dropped_with_its_reason() -> None:
    before = [a_row("a", "A"), a_row("b", "B"), a_row("c", "C", outcome="quarantined:encoding")]
    after = as_returned(table(a_row("b", "B!")), "mine")
    found = keep_every_row(table(*before), after, "mine", frozenset()).to_pylist()
    assert [(row["row_id"], row["instruction"], row["outcome"]) for row in found] == [
        ("a", "A", "dropped:mine"),
        ("b", "B!", ""),
        ("c", "C", "quarantined:encoding"),
    ]


@pytest.mark.parametrize(("after", "fault"), [(["a", "a"], "twice"), (["z"], "not given")])
def test_a_row_that_is_doubled_or_made_up_is_an_error(after: list[str], fault: str) -> None:
    returned = as_returned(table(*(a_row(name, "A") for name in after)), "mine")
    with pytest.raises(ValueError, match=fault):
        keep_every_row(table(a_row("a", "A")), returned, "mine", frozenset())


@pytest.mark.parametrize(
    "columns", [["row_id"], ["row_id", "response"], ["row_id", "instruction", "input", "response"]]
)
def test_columns_that_a_step_does_not_return_stay_as_they_are(columns: list[str]) -> None:
    turns = '[{"role": "system", "content": "Be brief."}]'
    before = table(a_row("a", "A", turns_before=turns, turns_after=turns, extra='{"id": 7}', input="i"))
    assert keep_every_row(before, as_returned(before.select(columns), "mine"), "mine", frozenset()).equals(before)


def test_a_text_that_a_step_sets_to_null_is_emptied() -> None:
    before = table(a_row("a", "A", input="i", extra='{"id": 7}'))
    returned = as_returned(pa.table({"row_id": ["a"], "input": pa.nulls(1, pa.string())}), "mine")
    [found] = keep_every_row(before, returned, "mine", frozenset()).to_pylist()
    assert (found["instruction"], found["input"], found["extra"], found["outcome"]) == ("A", "", '{"id": 7}', "")


def test_a_step_that_returns_no_ids_is_refused() -> None:
    with pytest.raises(ValueError, match="mine returned rows without row_id"):
        as_returned(pa.table({"response": ["a"]}), "mine")
    assert as_returned(pa.table({}), "mine").num_rows == 0, "a block without rows has no columns"


def test_the_source_of_the_module_is_part_of_what_rows_are_made_from(module: str) -> None:
    config = StepsConfig.model_validate([f"{module}:clean"])
    [[name, source]] = config.identity()["functions"]
    assert name == f"{module}:clean"
    assert len(source) == 16
    assert StepsConfig().identity() == {"functions": []}


@pytest.mark.parametrize(
    ("name", "message"),
    [("clean", "does not name a function"), ("no_such:clean", "No module"), ("json:none", "has no function")],
)  # fmt: skip
def test_a_name_that_cannot_be_called_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepsConfig(functions=(name,))


@pytest.mark.usefixtures("local_ray")
def test_steps_on_real_workers_keep_every_row(module: str) -> None:
    rows = ray.data.from_arrow(table(*(a_row(str(number), "plain") for number in range(4)), a_row("4", "spam")))
    steps = ("without_first", "only_some_columns", "clean")
    config = StepsConfig(functions=tuple(f"{module}:{name}" for name in steps))
    found = {row["row_id"]: row["outcome"] for row in apply_steps(rows, config, frozenset()).take_all()}
    assert found == {"0": "dropped:without_first", "1": "", "2": "", "3": "", "4": "dropped:clean"}


@pytest.mark.usefixtures("local_ray")
def test_a_step_on_all_rows_gets_those_held_out_in_a_call_of_its_own(module: str) -> None:
    rows = ray.data.from_arrow(table(a_row("a", "plain"), a_row("h", "held", outcome="dropped:held_out")))
    steps = StepsConfig(functions=(f"{module}:shouted",))
    found = {
        row["row_id"]: (row["instruction"], row["outcome"]) for row in apply_steps(rows, steps, frozenset()).take_all()
    }
    assert found == {"a": ("PLAIN", ""), "h": ("HELD", "dropped:held_out")}
