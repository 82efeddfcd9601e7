"""Which calls of a block are admitted, and how a stage's failures are reported."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators.teacher import dispatch
from operators.teacher.budget import Tokens
from operators.teacher.calls import CALLS
from operators.teacher.config import TeacherConfig
from operators.teacher.dispatch import failures_note
from operators.teacher.supervisor import Totals

TEACHER = TeacherConfig(backend="openai", model="m")


class Supervisor:
    """Admits the first two calls of every request."""

    def __init__(self) -> None:
        self.admit, self.asked = self, []

    def remote(self, keys: list[str], most: list[Tokens]) -> int:
        self.asked.append((keys, most))
        return 2


def calls(count: int) -> pa.Table:
    messages = '[{"role": "user", "content": "0123456789"}]'
    row = {"row_id": "r", "messages": messages, "schema": "", "max_tokens": 8}
    return pa.Table.from_pylist([{**row, "call_key": str(n)} for n in range(count)], schema=CALLS)


@pytest.mark.parametrize(("priced", "prompt"), [(True, 74), (False, 0)])  # ten bytes and the template
def test_a_block_is_cut_to_what_is_admitted_and_only_that_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, priced: bool, prompt: int
) -> None:
    monkeypatch.setattr(dispatch.ray, "get", lambda value: value)
    supervisor: Any = Supervisor()
    admitted = dispatch._admit(calls(5), supervisor, TEACHER, priced, str(tmp_path / "prompts"))
    assert admitted["call_key"].to_pylist() == ["0", "1"]
    assert supervisor.asked == [(["0", "1", "2", "3", "4"], [Tokens(prompt, 8)] * 5)]
    [file] = (tmp_path / "prompts").glob("*.parquet")
    assert pq.read_table(file)["call_key"].to_pylist() == ["0", "1"]


def test_an_empty_block_makes_no_call() -> None:
    assert dispatch._admit(CALLS.empty_table(), None, TEACHER, True, "").num_rows == 0


def test_failures_are_reported_with_their_messages_most_frequent_first() -> None:
    totals = Totals(40, 3, Tokens(), (("boom", 2), ("bang", 1)), 0)
    assert failures_note(totals) == "3 of 40 calls failed: 2 x boom; 1 x bang"
    assert failures_note(Totals(40, 0, Tokens(), (), 0)) == ""
