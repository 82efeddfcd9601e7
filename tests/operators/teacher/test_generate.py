"""The real teacher: vLLM through ray.data.llm, prompts as token ids, structured replies, failures as rows."""

import json

import pyarrow as pa
import pytest
import ray
from transformers import AutoTokenizer

from operators.reflect.prompts import RESPONSE_CRITERIA, RESPONSE_SECTIONS, reply_schema, response_reflection_prompt
from operators.teacher.calls import CALLS, REPLIES
from operators.teacher.config import TeacherConfig
from operators.teacher.failures import FATAL
from operators.teacher.generate import generate
from operators.teacher.prompt_tokens import prompt_token_ids

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


def test_a_prompt_has_one_beginning_and_ends_where_the_reply_begins(demo_model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    ids = prompt_token_ids(json.dumps([{"role": "user", "content": "Hello"}]), TeacherConfig(model=demo_model))
    text = tokenizer.decode(ids)
    assert text.endswith("Hello<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("<|im_start|>user") == 1


def test_where_and_how_fast_is_no_part_of_the_key() -> None:
    plain = TeacherConfig(backend="scripted", model="fluent")
    scaled = plain.model_copy(update={"replicas": (2, 9), "device": "cpu", "batch_rows": 1, "max_num_seqs": 3})
    assert plain.key_parts() == scaled.key_parts()
    assert plain.key_parts() != plain.model_copy(update={"temperature": 0.5}).key_parts()


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_real_engine_keeps_to_the_schema_and_gives_a_row_for_every_failure(demo_model: str) -> None:
    teacher = TeacherConfig(
        backend="vllm",
        model=demo_model,
        device="cpu",
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=8,
        batch_rows=8,
    )
    asked = "Name the capital of France."
    calls = [call(n, response_reflection_prompt(str(n), asked, "", f"It is number {n}.", "json")) for n in range(4)]
    calls.append(call(4, "word " * 3000))
    calls.append(call(5, "Count to one hundred, one number a line.", schema="", max_tokens=3))
    numbers = json.dumps({"type": "array", "items": {"type": "integer"}, "minItems": 200})  # no reply may end earlier
    calls.append(call(6, "Go on: " + "one two three " * 320, schema=numbers, max_tokens=400))
    replies = generate(ray.data.from_arrow(pa.Table.from_pylist(calls, schema=CALLS)), teacher)
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
    # It ran into the context before it ran into max_tokens: a reply that was cut off must not pass for a whole one.
    assert not rows["6"]["error"], rows["6"]["error"]
    assert rows["6"]["prompt_tokens"] + rows["6"]["generated_tokens"] <= 1024
    assert rows["6"]["generated_tokens"] < 400
    assert rows["6"]["finish_reason"] == "length"
