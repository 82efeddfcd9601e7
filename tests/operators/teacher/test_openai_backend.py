"""An endpoint that is busy, breaks, is slow, refuses or talks nonsense: asked again where that helps, else a reason."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pyarrow as pa
import pytest
import ray

from operators.teacher.calls import CALLS
from operators.teacher.config import TeacherConfig
from operators.teacher.failures import BUSY, FATAL, LOST, NO_COMPLETION, REFUSED, is_attempt
from operators.teacher.generate import generate
from operators.teacher.openai_backend import OpenAIEndpoint, Slots
from operators.teacher.prompt_tokens import TEMPLATE_TOKENS

GARBAGE = {
    "html": b"<html>Bad gateway</html>",
    "cut": b'{"choices": [{"message": {"content": "hal',
    "list": b"[1, 2]",
    "null": b"null",
    "nothing": b"",
    "no_choices": b'{"id": "1", "object": "chat.completion", "created": 0, "choices": []}',
    "no_text": b'{"choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant"}}]}',
    "odd usage": b'{"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": ""}}], "usage": "many"}',
    "error of a router": b'{"error": {"message": "upstream overloaded", "code": 502}}',
    "another object": b'{"result": "hello"}',
    "number": b'{"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": 5}}]}',
}

MESSAGES: dict[str, dict[str, Any]] = {
    "half an emoji": {"content": "clear \ud83d text"},  # json.dumps writes the escape, and no encoder refuses that
    "in parts": {"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": "the answer"}]},
    "thought only": {"content": None, "reasoning_content": "the answer"},
    "thought and said": {"content": "the answer", "reasoning_content": "let me see"},
}
USAGES: dict[str, dict[str, Any]] = {
    "null usage": {"usage": None},
    "zero usage": {"usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}},
    "huge usage": {"usage": {"prompt_tokens": 10**12, "completion_tokens": 10**12, "total_tokens": 10**12}},
}


class Endpoint(BaseHTTPRequestHandler):
    """Answers by what the prompt says: a status code, a kind of garbage, "slow", or the prompt from behind.

    "once 429" is that status the first time; "429" is it always.
    """

    protocol_version = "HTTP/1.1"
    seen: ClassVar[list[dict[str, Any]]] = []
    lock = threading.Lock()
    free = threading.Event()
    busy = most_busy = 0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][-1]["content"]
        kind = type(self)
        with kind.lock:
            before = sum(seen["body"]["messages"][-1]["content"] == content for seen in kind.seen)
            kind.seen.append({"body": body, "key": self.headers["Authorization"], "at": time.monotonic()})
            kind.busy += 1
            kind.most_busy = max(kind.most_busy, kind.busy)
        try:
            self._answer(content, before)
        finally:
            with kind.lock:
                kind.busy -= 1

    def _answer(self, content: str, before: int) -> None:
        words = content.split()
        if content == "too long":
            self._send(400, b'{"error": {"message": "too many tokens", "code": "context_length_exceeded"}}')
        elif words[0] == "once" and not before:
            self._send(int(words[1]), b'{"error": {"message": "slow down"}}')
        elif words[0].isdigit():
            self._send(
                int(words[0]), json.dumps({"error": {"message": f"bad {self.headers['Authorization']}"}}).encode()
            )
        elif content in GARBAGE:
            self._send(200, GARBAGE[content])
        elif content == "slow":
            self.free.wait(20)
            self.close_connection = True
        elif content == "hangs up":
            self.close_connection = True
        else:
            message = {"role": "assistant", "content": content[::-1], **MESSAGES.get(content, {})}
            choices = [{"index": 0, "finish_reason": "length", "message": message}]
            usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
            reply = {"id": "1", "object": "chat.completion", "created": 0, "choices": choices, "usage": usage}
            reply |= USAGES.get(content, {})
            if content == "no usage":
                del reply["usage"]
            self._send(200, json.dumps(reply).encode())

    def _send(self, status: int, payload: bytes) -> None:
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(payload)), "Retry-After": "0.1"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    Endpoint.seen, Endpoint.most_busy = [], 0
    Endpoint.free.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        Endpoint.free.set()
        server.shutdown()


def ask(base_url: str, contents: list[str], **settings: Any) -> dict[str, dict[str, Any]]:
    teacher = TeacherConfig(
        **{"backend": "openai", "model": "big", "base_url": base_url, "api_key_env": "A_VARIABLE_NOT_SET"} | settings
    )
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
    replies = generate(ray.data.from_arrow(pa.Table.from_pylist(calls, schema=CALLS)), teacher)
    rows = replies.take_all()
    assert sorted(row["row_id"] for row in rows) == sorted(contents)
    assert all((row["reply"] is None) == bool(row["error"]) for row in rows)
    return {row["row_id"]: row for row in rows}


def times_asked() -> Counter[str]:
    return Counter(seen["body"]["messages"][-1]["content"] for seen in Endpoint.seen)


@pytest.mark.usefixtures("local_ray")
class TestEndpoint:
    def test_the_request_says_all_and_the_reply_is_taken_whole(self, endpoint: str) -> None:
        row = ask(endpoint, ["good"], temperature=0.5)["good"]
        assert (row["reply"], row["finish_reason"]) == ("doog", "length")
        assert (row["prompt_tokens"], row["generated_tokens"]) == (3, 5)
        [body] = [seen["body"] for seen in Endpoint.seen]
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("big", 0.5, 7)
        assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}

    def test_what_may_pass_is_asked_again_and_what_cannot_is_not(self, endpoint: str) -> None:
        statuses = ["once 429", "once 500", "once 503", "400", "422", "hangs up"]
        rows = ask(endpoint, statuses, max_retries=1)
        assert {name: bool(row["error"]) for name, row in rows.items()} == {
            name: not name.startswith("once") for name in statuses
        }
        assert times_asked() == {name: 2 if name.startswith(("once", "hangs")) else 1 for name in statuses}
        assert "422" in rows["422"]["error"]
        assert rows["hangs up"]["error"].startswith(LOST)

    @pytest.mark.parametrize("status", ["401", "402", "403", "404"])
    def test_a_refusal_of_all_calls_is_told_once(self, endpoint: str, status: str) -> None:
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

    def test_what_no_file_can_hold_is_replaced(self, endpoint: str) -> None:
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

    def test_an_answer_that_a_reasoning_parser_took_for_thoughts_is_read(self, endpoint: str) -> None:
        rows = ask(endpoint, ["thought only", "thought and said"])
        assert rows["thought only"]["reply"] == "the answer"
        assert rows["thought and said"]["reply"] == "the answer"

    def test_nonsense_is_an_error_of_its_row_only(self, endpoint: str) -> None:
        rows = ask(endpoint, [*GARBAGE, "good"], max_retries=0)
        assert {name for name, row in rows.items() if row["error"]} == set(GARBAGE)
        assert rows["good"]["reply"] == "doog"

    def test_a_slow_reply_is_given_up(self, endpoint: str) -> None:
        rows = ask(endpoint, ["slow", "good"], max_retries=0, request_timeout_s=1)
        assert "Timeout" in rows["slow"]["error"]
        assert rows["good"]["reply"] == "doog"

    def test_a_rate_limit_spaces_the_requests(self, endpoint: str) -> None:
        ask(endpoint, [f"row {n}" for n in range(5)], requests_per_minute=300)
        moments = sorted(seen["at"] for seen in Endpoint.seen)
        assert moments[-1] - moments[0] >= 4 * 0.2 * 0.9

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


def answers(endpoint: str, contents: list[str], **settings: Any) -> dict[str, dict[str, Any]]:
    """As `ask`, without Ray."""
    teacher = TeacherConfig(backend="openai", model="big", base_url=endpoint, api_key_env="NOT_SET", **settings)

    async def all_of_them() -> list[dict[str, Any]]:
        actor = OpenAIEndpoint(teacher)
        call = {"call_key": "0" * 64, "row_id": "a", "schema": "", "max_tokens": 7}
        asked = [call | {"messages": json.dumps([{"role": "user", "content": content}])} for content in contents]
        return [await actor.answer(one) for one in asked]

    return dict(zip(contents, asyncio.run(all_of_them()), strict=True))


def test_what_is_no_chat_completion_is_no_attempt_and_its_first_words_are_told(endpoint: str) -> None:
    wrong = ["cut", "html", "list", "nothing", "no_choices", "error of a router", "another object"]
    errors = {name: reply["error"] for name, reply in answers(endpoint, wrong).items()}
    assert [name for name, error in errors.items() if not error.startswith(NO_COMPLETION) or is_attempt(error)] == []
    assert "upstream overloaded" in errors["error of a router"]
    assert "no choices" not in errors["html"]


@pytest.mark.parametrize(("status", "attempt"), [("429", False), ("502", False), ("503", False), ("500", True)])
def test_a_busy_endpoint_costs_no_row_an_attempt(endpoint: str, status: str, attempt: bool) -> None:
    error = answers(endpoint, [status], max_retries=0)[status]["error"]
    assert is_attempt(error) == attempt
    assert error.startswith(BUSY) != attempt


def test_a_text_in_parts_is_joined(endpoint: str) -> None:
    assert answers(endpoint, ["in parts"])["in parts"]["reply"] == "the answer"


def test_slots_halve_on_complaint_and_grow_by_one_a_round() -> None:
    now = [0.0]
    slots = Slots(16, clock=lambda: now[0])
    slots.heard(429)
    slots.heard(503)  # of the same moment: says nothing new
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


@pytest.fixture
def vllm_server(demo_model: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "small", "--max-model-len", "512"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", demo_model, *settings]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # as our own engines: one process less to start
    server = subprocess.Popen(
        [*command, "--dtype", "float32", "--enforce-eager"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until_healthy(port, server)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def wait_until_healthy(port: int, server: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 300
    while time.monotonic() < until:
        assert server.poll() is None, f"vLLM's server ended with {server.returncode}"
        connection = HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.5)  # there is nothing but polling to learn of an HTTP server's start
        finally:
            connection.close()
    raise AssertionError("vLLM's server did not start within 300 s")


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_real_vllm_server(vllm_server: str) -> None:
    contents = ["Name a river.", "Name a mountain.", "word " * 600]
    rows = ask(vllm_server, contents, model="small")
    for content in contents[:2]:
        assert not rows[content]["error"], rows[content]["error"]
        assert (rows[content]["finish_reason"], rows[content]["generated_tokens"]) == ("length", 7)
        assert rows[content]["prompt_tokens"] > 10
    assert "BadRequestError" in rows[contents[2]]["error"]  # longer than the context
