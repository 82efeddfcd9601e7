"""An endpoint that is busy is asked again; a call that it refuses becomes a row with the reason."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pyarrow as pa
import pytest
import ray

from operators.calls import CALLS
from operators.teacher import TeacherConfig, generate


class Endpoint(BaseHTTPRequestHandler):
    """Answers by what the prompt says: "busy" once with 429, "broken" always with 400, "empty" without choices."""

    seen: ClassVar[list[dict[str, Any]]] = []
    busy_once = True

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen.append({"body": body, "key": self.headers["Authorization"], "path": self.path})
        content = body["messages"][-1]["content"]
        if content == "busy" and type(self).busy_once:
            type(self).busy_once = False
            self._send(429, {"error": {"message": "slow down"}}, {"Retry-After": "0"})
        elif content == "broken":
            self._send(400, {"error": {"message": "no such model"}})
        else:
            choices = [
                {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": content[::-1]}}
            ]
            usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
            shown = [] if content == "empty" else choices
            self._send(200, {"id": "1", "object": "chat.completion", "created": 0, "choices": shown, "usage": usage})

    def _send(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        payload = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    Endpoint.seen, Endpoint.busy_once = [], True
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()


@pytest.mark.usefixtures("local_ray")
def test_replies_retries_and_refusals(endpoint: str) -> None:
    teacher = TeacherConfig(
        backend="openai", model="big", base_url=endpoint, temperature=0.5, api_key_env="A_VARIABLE_THAT_IS_NOT_SET"
    )
    schema = json.dumps({"type": "object"})
    calls = [
        {
            "call_key": f"{number:064x}",
            "row_id": content,
            "messages": json.dumps([{"role": "user", "content": content}]),
            "schema": schema if content == "good" else "",
            "max_tokens": 7,
        }
        for number, content in enumerate(["good", "busy", "broken", "empty"])
    ]
    replies = generate(ray.data.from_arrow(pa.Table.from_pylist(calls, schema=CALLS)), teacher)
    rows = {row["row_id"]: row for row in replies.take_all()}
    assert rows["good"]["reply"] == "doog"
    assert (rows["good"]["finish_reason"], rows["good"]["prompt_tokens"], rows["good"]["generated_tokens"]) == (
        "length",
        3,
        5,
    )
    assert rows["busy"]["reply"] == "ysub"
    assert rows["broken"]["reply"] is None
    assert "no such model" in rows["broken"]["error"]
    assert rows["empty"]["reply"] is None
    assert rows["empty"]["error"].startswith("IndexError")
    [good] = [request["body"] for request in Endpoint.seen if request["body"]["messages"][0]["content"] == "good"]
    assert (good["model"], good["temperature"], good["max_tokens"]) == ("big", 0.5, 7)
    assert good["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert {request["path"] for request in Endpoint.seen} == {"/v1/chat/completions"}
    assert len([1 for request in Endpoint.seen if request["body"]["messages"][0]["content"] == "busy"]) == 2
