"""Dialogues in a source: every turn is kept, every pair is a row, and all of one dialogue are held out together."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators import columns
from operators.read.config import ReadConfig
from operators.read.read_instructions import count_ignored_columns, read_instructions
from tests.operators.read.reading import GOOD, TOKENS, outcomes, read, turns
from tests.operators.read.source_samples import write_jsonl


@pytest.mark.usefixtures("local_ray")
def test_dialogues_keep_every_turn_and_columns_are_kept_or_named(tmp_path: Path) -> None:
    turns_of = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Ho"),
        ("user", "So?"),
        ("assistant", "<|im_end|>"),
    ]
    messages = [{"role": role, "content": content} for role, content in turns_of]
    dialogue = {"id": 7, "source": "mine", "messages": messages, "tools": []}
    write_jsonl(tmp_path / "a.jsonl", [dialogue, GOOD | {"id": 8, "category": "fruit"}])  # type: ignore[list-item]
    settings = {"pass_through": ["id"], "held_out_fraction": 0}
    by_instruction = {str(row["instruction"]): row for row in read(tmp_path, **settings)}
    row = by_instruction["So?"]
    before = json.loads(str(row["turns_before"]))
    assert [*before, {"role": "user", "content": "So?"}] == messages[:4]
    assert (row["response"], row["escaped"], row["turns_after"]) == ("<| im_end |>", True, "")
    assert (row["extra"], row["ignored_columns"]) == ('{"id": 7}', '["source"]')
    plain = by_instruction["Name a fruit."]
    assert (plain["turns_before"], plain["extra"], plain["ignored_columns"]) == ("", '{"id": 8}', '["category"]')
    config = ReadConfig.model_validate({"path": str(tmp_path), **settings})
    found = read_instructions(config, [str(tmp_path / "a.jsonl")], TOKENS)
    assert count_ignored_columns(found) == {"ignored_columns": {"source": 1, "category": 1}}


@pytest.mark.usefixtures("local_ray")
def test_every_pair_of_a_dialogue_is_a_row_and_all_are_held_out_together(tmp_path: Path) -> None:
    dialogues = [
        {"messages": [{"role": role, "content": f"{role} {n}.{k}"} for k in range(3) for role in ("user", "assistant")]}
        for n in range(40)
    ]
    write_jsonl(tmp_path / "a.jsonl", dialogues)  # type: ignore[arg-type]
    rows = read(tmp_path, turns="every", held_out_fraction=0.4)
    assert len({row["row_id"] for row in rows}) == len(rows) == 120
    of_dialogue: dict[str, set[object]] = {}
    for row in rows:
        of_dialogue.setdefault(str(row["instruction"]).partition(".")[0], set()).add(row["outcome"])
    assert all(len(found) == 1 for found in of_dialogue.values())
    assert 0 < outcomes(rows)[columns.HELD_OUT] < 120
    assert outcomes(read(tmp_path, turns="first")) == outcomes(read(tmp_path)) == {"": 40}


@pytest.mark.usefixtures("local_ray")
def test_messages_in_parquet(tmp_path: Path) -> None:
    path = tmp_path / "chat.parquet"
    chats = [json.loads(turns("user", "assistant")), json.loads(turns("user", "assistant", "user", "assistant"))]
    pq.write_table(pa.Table.from_pylist([*chats, {"messages": None}]), path)
    assert outcomes(read(path)) == {"": 2, "quarantined:missing_field": 1}
