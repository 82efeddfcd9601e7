"""A fake teacher: instant, deterministic replies for tests and for trying a flow without a model.

It fills every text property of the call's JSON schema, or every section that the prompt asks for, with a text
derived from the call's key. `model` chooses the behaviour: "fluent" always answers well; "careless" answers every
fourth call without structure and fails on every seventh, as real teachers do; "mortal" crashes with its process on a
prompt that contains the word POISON; "broken" fails on every call; "silent" never answers.
"""

import json
import os
import re
import time
import uuid
from functools import partial
from typing import Any

import pyarrow as pa
import ray

from operators.teacher.calls import Call, Reply, answered, failed, replies_table
from operators.teacher.config import TeacherConfig
from operators.teacher.engine_pool import EngineSpec
from operators.teacher.journal import Store

SECTION = re.compile(r"^\[(?P<name>[A-Z][A-Za-z ]+)\]$", re.MULTILINE)
CRITERION = re.compile(r"^(?P<name>[a-z ]+): \.\.\.$", re.MULTILINE)
CARELESS_UNPARSABLE, CARELESS_FAILING = 4, 7
SILENCE_S = 3600.0
MORTAL = "mortal"  # the only behaviour that runs in an engine actor, because it crashes it


class MortalEngine:
    """An actor like a real engine, which a prompt can crash."""

    async def wait_until_ready(self, timeout_s: float) -> None:
        """Return at once: there is nothing to load."""

    async def answer(self, call: Call, teacher: TeacherConfig) -> Reply:
        """The scripted reply, or the end of the process."""
        if "POISON" in call["messages"]:
            os._exit(1)
        return scripted_reply(call, teacher.model)

    async def stop(self) -> None:
        """Do nothing: no process was started."""


def mortal_spec(teacher: TeacherConfig) -> EngineSpec:
    """A pool of engines that can crash."""
    most = teacher.replicas if isinstance(teacher.replicas, int) else teacher.replicas[1]
    return EngineSpec(partial(_make_mortal), {"model": MORTAL, "most": most}, {"CPU": 0.0}, most)


def _make_mortal() -> tuple[Any, Any]:
    actor: Any = ray.remote(MortalEngine)
    return actor.options(num_cpus=0, max_concurrency=1000).remote(), None


def scripted_batch(batch: pa.Table, model: str, store: Store | None) -> pa.Table:
    """The replies to a batch of calls, without their texts if they are stored."""
    replies = [scripted_reply(call, model) for call in batch.to_pylist()]
    if store is not None and replies:
        store.keep(replies, uuid.uuid4().hex)
        replies = [{**reply, "reply": None} for reply in replies]
    return replies_table(replies)


def scripted_reply(call: Call, model: str) -> Reply:
    """One reply as one row of REPLIES."""
    number = int(call["call_key"][:8], 16)
    if model == "silent":
        time.sleep(SILENCE_S)
    if model == "broken" or (model == "careless" and number % CARELESS_FAILING == 0):
        return failed(call, "scripted failure")
    text = "I would rather talk about the weather."
    if model != "careless" or number % CARELESS_UNPARSABLE:
        text = _structured_text(call, number)
    return answered(call, text, "stop", len(call["messages"].split()), len(text.split()))


def _structured_text(call: Call, number: int) -> str:
    if call["schema"]:
        properties = json.loads(call["schema"])["properties"]
        return json.dumps({name: _value(name, kind, number) for name, kind in properties.items()})
    prompt = json.loads(call["messages"])[-1]["content"]
    bodies = {name: _text(name, number) for name in SECTION.findall(prompt)}
    bodies |= {"Critique": "\n".join(f"{name}: {number % 1000}." for name in CRITERION.findall(prompt)), "End": ""}
    return "\n".join(f"[{name}]\n{body}".strip() for name, body in bodies.items())


def _value(name: str, kind: dict[str, Any], number: int) -> str | int:
    if kind["type"] == "integer":
        return int(kind.get("minimum", 1)) + number % (int(kind.get("maximum", 10)) - int(kind.get("minimum", 1)) + 1)
    return _text(name, number)


def _text(name: str, number: int) -> str:
    """A text that filters keep: it contains none of the prompt's own words."""
    if "instruction" in name.casefold():
        return f"Describe object {number % 1000} and give an example of its use."
    return f"Number {number % 1000} is light and round; a ball is one of that kind."
