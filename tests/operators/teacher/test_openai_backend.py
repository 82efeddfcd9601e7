"""Calls to an endpoint that is busy, broken, slow or refuses are retried where this can help, and else get a reason."""

import asyncio
import json
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
import ray

from operators.teacher.calls import CALLS, Reply, replies_table
from operators.teacher.config import TeacherConfig
from operators.teacher.failures import BUSY, FATAL, LOST, NO_COMPLETION, REFUSED, is_attempt
from operators.teacher.generate import generate
from operators.teacher.openai_backend import OpenAIEndpoint, Slots
from operators.teacher.prompt_tokens import TEMPLATE_TOKENS
from tests.operators.teacher.moody_endpoint import GARBAGE, Endpoint, serving


@pytest.fixture
def endpoint() -> Iterator[str]:
    with serving() as address:
        yield address


def of_endpoint(base_url: str, **settings: Any) -> TeacherConfig:
    same = {"backend": "openai", "model": "big", "base_url": base_url, "api_key_env": "A_VARIABLE_NOT_SET"}
    return TeacherConfig(**same | settings)  # type: ignore[arg-type]


def calls_of(contents: list[str]) -> pa.Table:
    calls = [
        {
            "call_key": f"{number:064x}",
            "row_id": content,
            "messages": json.dumps([{"role": "user", "content": content}]),
            "schema": json.dumps({"type": "object"}) if content == "good" else "",
            "max_tokens": 7,
        }
        for number, content in enumerate(contents)
    ]
    return pa.Table.from_pylist(calls, schema=CALLS)


def ask(base_url: str, contents: list[str], **settings: Any) -> dict[str, dict[str, Any]]:
    """The stored results of these calls, made all at once by the actor's client in this process."""

    async def answer_all() -> list[Reply]:
        client = OpenAIEndpoint(of_endpoint(base_url, **settings))
        return await asyncio.gather(*(client.answer(call) for call in calls_of(contents).to_pylist()))

    rows = replies_table(asyncio.run(answer_all())).to_pylist()
    assert sorted(row["row_id"] for row in rows) == sorted(contents)
    assert all((row["reply"] is None) == bool(row["error"]) for row in rows)
    return {row["row_id"]: row for row in rows}


def times_asked() -> Counter[str]:
    return Counter(seen["body"]["messages"][-1]["content"] for seen in Endpoint.seen)


@pytest.mark.usefixtures("local_ray")
def test_calls_of_a_dataset_are_answered_by_an_actor(endpoint: str) -> None:
    calls = ray.data.from_arrow(calls_of(["good", "once 503", "400", "too long"]))
    rows = {row["row_id"]: row for row in generate(calls, of_endpoint(endpoint)).take_all()}
    assert {name: row["reply"] for name, row in rows.items()} == {
        "good": "doog",
        "once 503": "305 ecno",
        "400": None,
        "too long": None,
    }
    assert rows["too long"]["error"].startswith(FATAL)
    assert times_asked() == {"good": 1, "once 503": 2, "400": 1, "too long": 1}


class TestEndpoint:
    def test_request_and_reply_are_complete(self, endpoint: str) -> None:
        row = ask(endpoint, ["good"], temperature=0.5)["good"]
        assert (row["reply"], row["finish_reason"]) == ("doog", "length")
        assert (row["prompt_tokens"], row["generated_tokens"]) == (3, 5)
        [body] = [seen["body"] for seen in Endpoint.seen]
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("big", 0.5, 7)
        assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}

    def test_temporary_errors_are_retried_and_permanent_ones_are_not(self, endpoint: str) -> None:
        statuses = ["once 429", "once 500", "once 503", "400", "422", "hangs up"]
        rows = ask(endpoint, statuses, max_retries=1)
        assert {name: bool(row["error"]) for name, row in rows.items()} == {
            name: not name.startswith("once") for name in statuses
        }
        assert times_asked() == {name: 2 if name.startswith(("once", "hangs")) else 1 for name in statuses}
        assert "422" in rows["422"]["error"]
        assert rows["hangs up"]["error"].startswith(LOST)

    @pytest.mark.parametrize("status", ["401", "402", "403", "404"])
    def test_a_refusal_of_all_calls_is_reported_once(self, endpoint: str, status: str) -> None:
        calls = [f"{status} {n}" for n in range(6)]
        rows = ask(endpoint, calls, concurrent_requests=1)
        assert all(row["error"].startswith(REFUSED) and status in row["error"] for row in rows.values())
        assert sum(times_asked().values()) == 1

    def test_nobody_at_the_address_is_a_refusal(self) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            address = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
            row = ask(address, ["good"], max_retries=0)["good"]
        assert row["error"].startswith(REFUSED)
        assert "Connect" in row["error"]

    def test_a_prompt_that_is_too_long_is_the_calls_own_fault(self, endpoint: str) -> None:
        assert ask(endpoint, ["too long"])["too long"]["error"].startswith(FATAL)

    def test_characters_that_no_file_can_hold_are_replaced(self, endpoint: str) -> None:
        rows = ask(endpoint, ["half an emoji", "good"])
        assert rows["half an emoji"]["reply"] == "clear \ufffd text"
        assert rows["good"]["reply"] == "doog"

    @pytest.mark.parametrize("kind", ["no usage", "null usage", "zero usage", "huge usage"])
    def test_missing_token_counts_are_estimated_from_above(self, endpoint: str, kind: str) -> None:
        row = ask(endpoint, [kind], model="big")[kind]
        assert row["reply"] == kind[::-1]
        if kind == "huge usage":
            assert row["prompt_tokens"] == 2**31 - 1
            return
        assert row["prompt_tokens"] == len(kind) + TEMPLATE_TOKENS
        assert row["generated_tokens"] == 7  # no more than max_tokens

    def test_a_tokenizer_counts_what_the_endpoint_does_not(self, endpoint: str, demo_model: str) -> None:
        row = ask(endpoint, ["no usage"], tokenizer=demo_model)["no usage"]
        assert row["prompt_tokens"] == 2 + TEMPLATE_TOKENS

    def test_parameters_are_renamed_left_out_and_added(self, endpoint: str) -> None:
        ask(
            endpoint,
            ["good"],
            rename_parameters={"max_tokens": "max_completion_tokens"},
            leave_out_parameters=["temperature", "seed"],
            response_format="json_object",
            top_k=20,
            stop=["END"],
            chat_template_kwargs={"enable_thinking": False},
            extra_body={"reasoning_effort": "low"},
        )
        [body] = [seen["body"] for seen in Endpoint.seen]
        assert not {"max_tokens", "temperature", "seed"} & set(body)
        assert (body["max_completion_tokens"], body["top_k"], body["stop"]) == (7, 20, ["END"])
        assert body["response_format"] == {"type": "json_object"}
        assert (body["chat_template_kwargs"], body["reasoning_effort"]) == ({"enable_thinking": False}, "low")

    def test_no_response_format_is_asked_for_if_the_endpoint_knows_none(self, endpoint: str) -> None:
        ask(endpoint, ["good"], response_format="none")
        assert "response_format" not in Endpoint.seen[0]["body"]

    def test_an_answer_that_a_reasoning_parser_mistook_for_thoughts_is_read(self, endpoint: str) -> None:
        rows = ask(endpoint, ["thought only", "thought and said", "cut in thoughts"])
        assert rows["thought only"]["reply"] == "the answer"
        assert rows["thought and said"]["reply"] == "the answer"
        assert (rows["cut in thoughts"]["reply"], rows["cut in thoughts"]["generated_tokens"]) == (None, 5)

    def test_nonsense_is_an_error_of_its_row_only(self, endpoint: str) -> None:
        rows = ask(endpoint, [*GARBAGE, "good"], max_retries=0)
        assert {name for name, row in rows.items() if row["error"]} == set(GARBAGE)
        assert rows["good"]["reply"] == "doog"

    def test_a_slow_reply_is_given_up(self, endpoint: str) -> None:
        rows = ask(endpoint, ["slow", "good"], max_retries=0, request_timeout_s=1)
        assert "Timeout" in rows["slow"]["error"]
        assert rows["good"]["reply"] == "doog"

    def test_a_rate_limit_spaces_the_requests(self, endpoint: str) -> None:
        ask(endpoint, [f"row {n}" for n in range(7)], requests_per_minute=300)
        moments = sorted(seen["at"] for seen in Endpoint.seen)
        assert moments[-1] - moments[0] >= 6 * 0.2 * 0.8  # the first may arrive late

    def test_no_more_requests_are_in_flight_than_allowed(self, endpoint: str) -> None:
        ask(endpoint, [f"row {n}" for n in range(40)], concurrent_requests=3)
        assert 1 <= Endpoint.most_busy <= 3

    def test_the_key_comes_from_the_environment_and_is_in_no_error(
        self, endpoint: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SOME_KEY", "secret-1234")
        actor = OpenAIEndpoint(TeacherConfig(backend="openai", model="big", base_url=endpoint, api_key_env="SOME_KEY"))
        call = {"call_key": "0" * 64, "row_id": "a", "schema": "", "max_tokens": 7}
        reply = asyncio.run(actor.answer({**call, "messages": json.dumps([{"role": "user", "content": "401"}])}))
        assert Endpoint.seen[0]["key"] == "Bearer secret-1234"
        assert "<key>" in reply["error"]
        assert "secret" not in reply["error"]


def test_a_reply_that_is_not_a_chat_completion_is_not_an_attempt_and_is_quoted(endpoint: str) -> None:
    wrong = ["cut", "html", "list", "nothing", "no_choices", "error of a router", "another object"]
    errors = {name: reply["error"] for name, reply in ask(endpoint, wrong).items()}
    assert [name for name, error in errors.items() if not error.startswith(NO_COMPLETION) or is_attempt(error)] == []
    assert "upstream overloaded" in errors["error of a router"]
    assert "no choices" not in errors["html"]


@pytest.mark.parametrize(("status", "attempt"), [("429", False), ("502", False), ("503", False), ("500", True)])
def test_a_busy_endpoint_costs_no_row_an_attempt(endpoint: str, status: str, attempt: bool) -> None:
    error = ask(endpoint, [status], max_retries=0)[status]["error"]
    assert is_attempt(error) == attempt
    assert error.startswith(BUSY) != attempt


def test_a_text_in_parts_is_joined(endpoint: str) -> None:
    assert ask(endpoint, ["in parts"])["in parts"]["reply"] == "the answer"


def test_slots_halve_on_a_rejection_and_grow_by_one_per_round() -> None:
    now = [0.0]
    slots = Slots(16, clock=lambda: now[0])
    slots.heard(429)
    slots.heard(503)  # from the same moment, so not a new rejection
    assert slots.limit == 8
    now[0] = 2.0
    slots.heard(429)
    assert slots.limit == 4
    for _ in range(4):
        slots.heard(200)
    assert 4.8 <= slots.limit <= 5
    slots.heard(404)
    for _ in range(1000):
        slots.heard(200)
    assert slots.limit == 16
    for _ in range(10):
        now[0] += 2
        slots.heard(529)
    assert slots.limit == 1
