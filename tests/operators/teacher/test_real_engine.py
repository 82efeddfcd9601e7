"""One real engine: vLLM through Ray, asked for structured replies, for failures as rows, and for verdicts."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from operators.evaluate.config import EvaluateConfig
from operators.evaluate.evaluate import Models, evaluate
from operators.reflect.parse_replies import parse_reply
from operators.reflect.prompts import RESPONSE_CRITERIA, RESPONSE_SECTIONS, reply_schema, response_reflection_prompt
from operators.teacher.calls import CALLS, REPLIES
from operators.teacher.config import TeacherConfig
from operators.teacher.failures import FATAL
from operators.teacher.generate import generate
from operators.teacher.ledger import Ledger
from tests.operators.evaluate.held_out_rows import held_out, measure_here

SCHEMA = reply_schema(RESPONSE_CRITERIA, RESPONSE_SECTIONS)


def call(number: int, content: str, schema: str = SCHEMA, max_tokens: int = 160) -> dict[str, object]:
    messages = json.dumps([{"role": "user", "content": content}])
    return {
        "call_key": f"{number:064x}",
        "row_id": str(number),
        "messages": messages,
        "schema": schema,
        "max_tokens": max_tokens,
    }


@pytest.mark.slow
def test_real_engine_keeps_to_the_schema_and_gives_a_row_for_every_failure(shared_teacher: TeacherConfig) -> None:
    asked = "Name the capital of France."
    calls = [call(n, response_reflection_prompt(str(n), asked, "", f"It is number {n}.", "json")) for n in range(4)]
    calls.append(call(4, "word " * 3000))
    calls.append(call(5, "Count to one hundred, one number a line.", schema="", max_tokens=3))
    numbers = json.dumps({"type": "array", "items": {"type": "integer"}, "minItems": 200})  # no reply can end earlier
    calls.append(call(6, "Go on: " + "one two three " * 320, schema=numbers, max_tokens=400))
    replies = generate(ray.data.from_arrow(pa.Table.from_pylist(calls, schema=CALLS)), shared_teacher)
    table = pa.concat_tables(replies.iter_batches(batch_format="pyarrow", batch_size=None))
    assert table.schema.names == REPLIES.names
    rows = {row["row_id"]: row for row in table.to_pylist()}
    assert sorted(rows) == ["0", "1", "2", "3", "4", "5", "6"]
    for number in "0123":
        row = rows[number]
        assert row["prompt_tokens"] > 50
        if row["finish_reason"] == "stop":  # the parser may still refuse what so small a model writes into the fields
            assert sorted(json.loads(row["reply"])) == sorted(json.loads(calls[0]["schema"])["required"])
    assert rows["4"]["reply"] is None
    assert rows["4"]["error"].startswith(FATAL)
    assert "teacher.max_model_len: 1024" in rows["4"]["error"]
    assert (rows["5"]["generated_tokens"], rows["5"]["finish_reason"]) == (3, "length")
    # It reached the context limit before max_tokens; a reply that was cut off must not be taken for a complete one.
    assert not rows["6"]["error"], rows["6"]["error"]
    assert rows["6"]["prompt_tokens"] + rows["6"]["generated_tokens"] <= 1024
    assert rows["6"]["generated_tokens"] < 400
    assert rows["6"]["finish_reason"] == "length"


@pytest.mark.slow
def test_a_real_engine_writes_code_quotes_and_paragraphs(shared_teacher: TeacherConfig) -> None:
    """The model copies a reply from its prompt, as a larger model would write by itself."""
    text = 'Use "print".\n\n```python\nprint("Hello")\n```\n\nIt writes one line.'
    schema = reply_schema({"accuracy": ""}, {"better_response": "Better Answer"})
    wanted = {"accuracy": "It is right.", "better_response": text}
    other = {"accuracy": "It is wrong.", "better_response": 'Say "three".\n\nThen stop.'}
    turns = [
        *({"role": role, "content": json.dumps(other)} for role in ("user", "assistant")),
        {"role": "user", "content": json.dumps(wanted)},
    ]
    hard = 'He said "no".\n\n```python\n\tprint("a\\\\b")\n```\n\nEnd: \\frac{1}{2}, 文字 😀.'
    forced = json.loads(schema)  # what no prompt makes so small a model write: the grammar leaves it nothing else
    forced["properties"]["better_response"] = {"type": "string", "enum": [hard]}
    asked = {"row_id": "a", "messages": json.dumps(turns), "max_tokens": 200}
    calls = [
        {"call_key": f"{number}" * 64, **asked, "row_id": name, "schema": kind}
        for number, (name, kind) in enumerate([("copied", schema), ("forced", json.dumps(forced))])
    ]
    found = generate(ray.data.from_arrow(pa.Table.from_pylist(calls, schema=CALLS)), shared_teacher).take_all()
    assert {(row["error"], row["finish_reason"]) for row in found} == {("", "stop")}
    read = {
        row["row_id"]: parse_reply(row["reply"], "stop", "json", {"accuracy": ""}, {"better_response": "Better Answer"})
        for row in found
    }
    copied, kept = (
        getattr(read[name], "texts", {}).get("better_response", read[name]) for name in ("copied", "forced")
    )
    assert kept == hard
    assert copied.count("\n\n") == 2
    assert 'print("Hello")' in copied
    assert '"print"' in copied


@pytest.mark.slow
def test_a_real_model_answers_and_a_real_vllm_teacher_judges(
    shared_teacher: TeacherConfig,
    demo_model: str,
    tiny_model: str,
    alpaca: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("operators.evaluate.evaluate._measure", measure_here)
    records = [record for record in json.loads(alpaca.read_text())[:60] if len(record["output"]) < 400][:4]
    texts = [
        (f"r{number}", record["instruction"], record["input"], record["output"])
        for number, record in enumerate(records)
    ]
    config = EvaluateConfig(num_samples=2, max_new_tokens=12, judge_critique=False, judge_max_tokens=32)
    ledger = Ledger(str(tmp_path))
    compared = Models(tiny_model, demo_model, str(tmp_path / "rows.parquet"))
    result = evaluate(held_out(texts), config, compared, shared_teacher, ledger)
    assert result.held_out_loss.student < result.held_out_loss.base
    assert len(result.samples) == 2
    assert result.judge.unparsed == 0
    assert ledger.metrics()["calls"] == 4
    again = evaluate(held_out(texts), config, compared, shared_teacher, Ledger(str(tmp_path)))
    assert again.judge == result.judge
