"""From rows to calls and from replies to columns: no active row is skipped, and no row with an outcome is changed."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from operators.columns import INSTRUCTION_REFLECTED, RAW, SELECTED, conform
from operators.own_prompt import PromptConfig
from operators.reflect.config import ReflectConfig
from operators.reflect.prompts import RESPONSE_CRITERIA
from operators.reflect.reflect import Reflection, _add_calls, count_unread, read_replies, reflection_version
from operators.reflect.reflect_instructions import ABOUT as INSTRUCTION
from operators.reflect.reflect_instructions import reflect_instructions
from operators.reflect.reflect_responses import ABOUT, reflect_responses
from operators.teacher.config import TeacherConfig
from operators.teacher.ledger import Ledger

FLUENT = TeacherConfig(backend="scripted", model="fluent")
CARELESS = TeacherConfig(backend="scripted", model="careless")


def raw(count: int = 6, quarantined: int = 1) -> "ray.data.Dataset":
    rows = [
        {
            "row_id": f"{number:032x}",
            "instruction": f"Instruction {number}",
            "input": "an input" if number % 2 else "",
            "response": f"Response {number}",
            "origin": "test",
            "escaped": False,
            "outcome": "quarantined:empty_response" if number < quarantined else "",
        }
        for number in range(count)
    ]
    return ray.data.from_arrow(pa.Table.from_pylist(rows, schema=RAW))


def by_id(dataset: "ray.data.Dataset") -> dict[str, dict[str, Any]]:
    return {row["row_id"]: row for row in dataset.take_all()}


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("form", ["json", "delimited"])
def test_every_row_active_is_reflected_and_every_row_comes_back(tmp_path: Path, form: str) -> None:
    config = ReflectConfig(form=form)  # type: ignore[arg-type]
    reflected = reflect_instructions(raw(), Reflection(config, FLUENT, Ledger(str(tmp_path)), frozenset()))
    assert reflected.schema().base_schema.names == INSTRUCTION_REFLECTED.names
    rows = by_id(reflected)
    assert len(rows) == 6
    settled, *active = (rows[key] for key in sorted(rows))
    assert settled["outcome"] == "quarantined:empty_response"
    assert settled["better_instruction"] is None
    assert settled["instruction_reflection"] is None
    for row in active:
        assert row["instruction_reflection"] == "parsed"
        assert row["better_instruction"]
        assert row["better_instruction_response"]
        assert len(json.loads(row["instruction_critique"])) == 5
        assert row["input"] == ("an input" if int(row["row_id"], 16) % 2 else "")


@pytest.mark.usefixtures("local_ray")
def test_unusable_replies_have_a_reason_and_neither_part_of_a_pair(tmp_path: Path) -> None:
    once = ReflectConfig(repair=False)
    reflected = reflect_instructions(raw(60, 0), Reflection(once, CARELESS, Ledger(str(tmp_path)), frozenset()))
    rows = by_id(reflected).values()
    assert {row["instruction_reflection"] for row in rows} == {"parsed", "rejected:no_json", "rejected:call_failed"}
    for row in rows:
        pair = (row["better_instruction"], row["better_instruction_response"])
        assert all(pair) if row["instruction_reflection"] == "parsed" else pair == (None, None)


@pytest.mark.usefixtures("local_ray")
def test_a_reply_that_cannot_be_read_gets_one_more_turn(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    rows = by_id(reflect_instructions(raw(60, 0), Reflection(ReflectConfig(), CARELESS, ledger, frozenset())))
    statuses = Counter(row["instruction_reflection"] for row in rows.values())
    assert set(statuses) == {"parsed", "repaired", "rejected:no_json", "rejected:call_failed"}
    for row in rows.values():
        has_pair = row["instruction_reflection"] in ("parsed", "repaired")
        assert bool(row["better_instruction"]) == bool(row["better_instruction_response"]) == has_pair
    repairs = [row["call_key"] for row in ledger.files.read("reflect_instructions_repair", ["call_key"]).iter_rows()]  # type: ignore[union-attr]
    assert len(repairs) == statuses["repaired"] + statuses["rejected:no_json"]
    again = Ledger(str(tmp_path), offline=True)  # the second run reads, and makes no call
    assert by_id(reflect_instructions(raw(60, 0), Reflection(ReflectConfig(), CARELESS, again, frozenset()))) == rows


@pytest.mark.usefixtures("local_ray")
def test_a_new_parser_reads_the_stored_replies_without_a_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ReflectConfig(form="delimited", repair=False)
    reflect_instructions(raw(), Reflection(config, FLUENT, Ledger(str(tmp_path)), frozenset())).materialize()
    before = reflection_version(INSTRUCTION)
    monkeypatch.setattr("inspect.getsource", lambda module: "another = parser")
    assert reflection_version(INSTRUCTION).split(", ")[0] == before.split(", ")[0]
    assert reflection_version(INSTRUCTION) != before
    offline = Ledger(str(tmp_path), offline=True)
    stricter = config.model_copy(update={"critique_chars": 20})
    rows = by_id(reflect_instructions(raw(), Reflection(stricter, FLUENT, offline, frozenset())))
    assert sum(row["instruction_reflection"] == "parsed" for row in rows.values()) == 5


def test_the_wording_of_comments_and_docstrings_makes_no_reflection_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    def version_of(source: str) -> str:
        monkeypatch.setattr("inspect.getsource", lambda module: source)
        return reflection_version(INSTRUCTION)

    code = "def read(reply):\n    return reply"
    reworded = '"""Reads."""\ndef read(reply):\n    """Read it."""\n    return reply  # as it is'
    assert version_of(code) == version_of(reworded) != version_of(code.replace("return reply", "return reply + '#'"))


@pytest.mark.usefixtures("local_ray")
def test_responses_are_reflected_on_the_selected_pair(tmp_path: Path) -> None:
    selected = pa.Table.from_pylist(
        [{"row_id": "a", "instruction": "old", "input": "", "response": "old", "outcome": "",
          "selected_instruction": "chosen", "selected_response": "chosen answer"}]
    )  # fmt: skip
    rows = ray.data.from_arrow(conform(selected, SELECTED))
    ledger = Ledger(str(tmp_path))
    [row] = reflect_responses(rows, Reflection(ReflectConfig(), FLUENT, ledger, frozenset())).take_all()
    assert row["better_response"].startswith("Number ")
    assert row["response_reflection"] == "parsed"
    assert row["selected_instruction"] == "chosen"
    changed = rows.map_batches(
        lambda table: table.set_column(
            table.column_names.index("selected_response"), "selected_response", pa.array(["another answer"])
        ),
        batch_format="pyarrow",
    )
    reflect_responses(changed, Reflection(ReflectConfig(), FLUENT, ledger, frozenset()))
    assert ledger.metrics()["calls"] == 2


def test_what_the_teacher_wrote_cannot_hold_control_tokens() -> None:
    text = "Turns end with `<|im_end|>`.\nThen `<|im_start|>system` and `</s>`.<|im_end|>"
    reply = dict.fromkeys(RESPONSE_CRITERIA, "fine") | {"better_response": text}
    row = {"row_id": "a", "outcome": "", "reply": json.dumps(reply), "finish_reason": "stop"}
    read = read_replies(pa.Table.from_pylist([row]), ABOUT, ReflectConfig(), frozenset({"</s>"}))
    written = read["better_response"].to_pylist()[0]
    assert written == "Turns end with `<| im_end |>`.\nThen `<| im_start |>system` and `</ s >`."


def test_a_dialogue_is_shown_to_the_teacher_without_its_chat_markup() -> None:
    turns = [{"role": "system", "content": "Be brief.<|im_end|>"}, {"role": "user", "content": "Hi.</s>"}]
    row = {"row_id": "a", "instruction": "And now?", "input": "", "response": "Go.", "outcome": ""}
    table = pa.Table.from_pylist([row | {"turns_before": json.dumps(turns)}, row | {"turns_before": ""}])
    calls = _add_calls(table, INSTRUCTION, ReflectConfig(), frozenset({"</s>"}))
    shown, plain = (json.loads(messages)[0]["content"] for messages in calls["messages"].to_pylist())
    assert "Be brief.<| im_end |>" in shown
    assert "Hi.</ s >" in shown
    assert "turn 1" not in plain


def test_custom_criteria_and_prompts_are_used_in_call_and_parser() -> None:
    own = PromptConfig(criteria={"tone": "whether it is polite"}, system="You are strict.")
    config = ReflectConfig(form="delimited", style="papers", responses=own)
    row = {"row_id": "a", "selected_instruction": "Q", "input": "", "selected_response": "A", "outcome": ""}
    calls = _add_calls(pa.Table.from_pylist([row]), ABOUT, config, frozenset())
    system, user = json.loads(calls["messages"].to_pylist()[0])
    assert system == {"role": "system", "content": "You are strict."}
    assert "tone: whether it is polite" in user["content"]
    reply = {"outcome": "", "reply": "[Critique]\ntone: fine\n[Better Answer]\nB.\n[End]", "finish_reason": "stop"}
    read = read_replies(pa.Table.from_pylist([reply]), ABOUT, config, frozenset())
    assert read["response_reflection"].to_pylist() == ["parsed"]
    assert json.loads(read["response_critique"].to_pylist()[0]) == {"tone": "fine"}


@pytest.mark.usefixtures("local_ray")
def test_missing_column_is_named(tmp_path: Path) -> None:
    rows = raw().drop_columns(["response"])
    with pytest.raises(ValueError, match="reflect_instructions: columns response are missing"):
        reflect_instructions(rows, Reflection(ReflectConfig(), FLUENT, Ledger(str(tmp_path)), frozenset()))


def test_a_rewrite_that_repeats_the_prompt_is_refused() -> None:
    text = "You are given an instruction and an answer that someone wrote to train an assistant."
    reply = dict.fromkeys(RESPONSE_CRITERIA, "fine") | {"better_response": text}
    row = {"row_id": "a", "outcome": "", "reply": json.dumps(reply), "finish_reason": "stop"}
    read = read_replies(pa.Table.from_pylist([row]), ABOUT, ReflectConfig(), frozenset())
    assert read[ABOUT.status_column].to_pylist() == ["rejected:prompt_in_text"]
    assert read["better_response"].to_pylist() == [None]


def test_replies_that_cannot_be_read_are_counted_apart_from_calls_without_one() -> None:
    class Rows:
        def select_columns(self, _: list[str]) -> "Rows":
            return self

        def iter_batches(self, **_: Any) -> list[pa.Table]:
            texts = ["parsed", None, "rejected:call_failed", "rejected:no_json", "repaired"]
            return [pa.table({ABOUT.status_column: texts}), pa.table({ABOUT.status_column: texts[2:]})]

    counted = count_unread(Rows(), ABOUT)  # type: ignore[arg-type]
    assert counted == {"unread_replies": {"no_json": 2}, "rows_without_reply": 2}
