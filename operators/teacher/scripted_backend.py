"""The shipped fake teacher: instant, deterministic replies for logic tests and for trying a flow without a model.

It fills every text property of the call's JSON schema, or every section that the prompt asks for, with a text
derived from the call's key. `model` chooses the behaviour: "fluent" always answers well; "careless" answers every
fourth call without structure and lets every seventh fail, as real teachers do; "mortal" dies, with its process, of a
prompt that contains the word POISON; "broken" lets every call fail; "silent" never answers.
"""

import json
import os
import re
import time
from typing import Any

import pyarrow as pa
import ray
from ray.data import Dataset

from operators.teacher.calls import REPLIES, WITH_REPLIES
from operators.teacher.config import TeacherConfig
from operators.teacher.supervisor import FATAL

SECTION = re.compile(r"^\[(?P<name>[A-Z][A-Za-z ]+)\]$", re.MULTILINE)
CRITERION = re.compile(r"^(?P<name>[a-z ]+): \.\.\.$", re.MULTILINE)
CARELESS_UNPARSABLE, CARELESS_FAILING = 4, 7
SILENCE_S = 3600.0


def scripted_replies(calls: list[dict[str, Any]], model: str, supervisor: Any) -> list[dict[str, Any]]:
    """The replies to a batch, which the supervisor is told of as by a real engine; None leaves that out."""
    if supervisor is None or not calls:
        return [scripted_reply(call, model) for call in calls]
    start = ray.get(supervisor.begin.remote([call["call_key"] for call in calls]))
    if start.closed:
        raise RuntimeError(start.closed)
    replies = []
    for call in calls:
        if call["call_key"] in start.deadly:
            failed = {"prompt_tokens": 0, "generated_tokens": 0, "error": FATAL}
            replies.append({"call_key": call["call_key"], "row_id": call["row_id"], **failed})
            continue
        if start.one_by_one:
            ray.get(supervisor.begin_turn.remote(call["call_key"]))
        replies.append(scripted_reply(call, model))
        if start.one_by_one:
            ray.get(supervisor.end_turn.remote(call["call_key"]))
    return replies


def scripted_reply(call: dict[str, Any], model: str) -> dict[str, Any]:
    """One reply in the columns of `teacher.REPLIES`."""
    number = int(call["call_key"][:8], 16)
    reply = {"call_key": call["call_key"], "row_id": call["row_id"], "finish_reason": "stop", "error": ""}
    if model == "mortal" and "POISON" in call["messages"]:
        os._exit(1)
    if model == "silent":
        time.sleep(SILENCE_S)
    if model == "broken" or (model == "careless" and number % CARELESS_FAILING == 0):
        failed = {"reply": None, "finish_reason": None, "error": "scripted failure"}
        return {**reply, **failed, "prompt_tokens": 0, "generated_tokens": 0}
    text = "I would rather talk about the weather."
    if model != "careless" or number % CARELESS_UNPARSABLE:
        text = _structured_text(call, number)
    words = {"prompt_tokens": len(call["messages"].split()), "generated_tokens": len(text.split())}
    return {**reply, **words, "reply": text}


def _structured_text(call: dict[str, Any], number: int) -> str:
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
    """A text that may be learnt: it holds none of the prompt's own words."""
    if "instruction" in name.casefold():
        return f"Describe object {number % 1000} and give an example of its use."
    return f"Number {number % 1000} is light and round; a ball is one of that kind."


def generate_scripted(calls: Dataset, teacher: TeacherConfig, supervisor: Any) -> Dataset:
    """Answer calls by the script that `teacher.model` names; columns as of `generate`."""

    def answer(batch: pa.Table) -> pa.Table:
        replies = scripted_replies(batch.to_pylist(), teacher.model, supervisor)
        return pa.Table.from_pylist(replies, schema=REPLIES)

    return calls.map_batches(answer, batch_size=None, batch_format="pyarrow", **WITH_REPLIES)
