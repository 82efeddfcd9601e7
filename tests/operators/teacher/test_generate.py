"""The right backend answers a teacher's calls, with one row for each call. test_real_engine.py has a real engine."""

import json

import pyarrow as pa
import pytest
import ray

from operators.teacher.calls import REPLIES
from operators.teacher.config import TeacherConfig
from operators.teacher.generate import engine_spec, generate
from operators.teacher.scripted_backend import MORTAL

SCHEMA = json.dumps({"properties": {"better_response": {"type": "string"}}})


@pytest.mark.usefixtures("local_ray")
def test_each_call_gets_one_reply() -> None:
    message = json.dumps([{"role": "user", "content": "improve"}])
    calls = pa.table(
        {
            "call_key": [f"{number:016x}" for number in range(7)],
            "row_id": [f"r{number}" for number in range(7)],
            "messages": [message] * 7,
            "schema": [SCHEMA] * 7,
            "max_tokens": pa.array([64] * 7, pa.int32()),
        }
    )
    blocks = [calls.slice(0, 4), calls.slice(4)]
    replies = generate(ray.data.from_arrow(blocks), TeacherConfig(backend="scripted", model="fluent"))
    found = pa.concat_tables(ray.get(replies.to_arrow_refs()))
    assert found.schema.names == REPLIES.names
    assert sorted(found["call_key"].to_pylist()) == calls["call_key"].to_pylist()
    assert all(json.loads(reply)["better_response"] for reply in found["reply"].to_pylist())


def test_engines_are_started_only_for_backends_that_have_them(demo_model: str) -> None:
    endpoint = TeacherConfig(backend="openai", model="big", base_url="http://127.0.0.1:1/v1")
    assert engine_spec(endpoint) is None
    assert engine_spec(TeacherConfig(backend="scripted", model="fluent")) is None
    assert engine_spec(TeacherConfig(backend="scripted", model=MORTAL)) is not None
    engine = TeacherConfig(backend="vllm", model=demo_model, device="cpu")
    names = [
        spec.name
        for changes in ({}, {"temperature": 0.5}, {"max_model_len": 512})
        if (spec := engine_spec(engine.model_copy(update=changes)))
    ]
    assert names[0] == names[1] != names[2], "one engine answers at any temperature, but not with any context"
