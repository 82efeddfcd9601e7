"""Servers for chaos.py: a teacher that counts its answers, and an S3 store; both can be made to fail."""

import hashlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from operators.teacher.scripted_backend import scripted_reply

LIES = (
    b"<html>Bad gateway</html>",
    b'{"choices": []}',
    b'{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}',
    b'{"choices": [{"mess',
)
MODES = ("dead", "slow", "lying", "errors", "busy")


class Teacher:
    """An OpenAI-compatible endpoint on 127.0.0.1 that always gives the same answer to the same prompt.

    Attributes:
        paid: number of complete, correct answers to each prompt, by `prompt_key`.
        mode: its present behaviour: "" answers, or one of MODES.
    """

    def __init__(self, seconds: float, slow_seconds: float) -> None:
        """Answer each call after `seconds`; in the mode "slow" after `slow_seconds`."""
        self.paid: Counter[str] = Counter()
        self.mode = ""
        self._seconds, self._slow_seconds = seconds, slow_seconds
        self._lock, self._number = threading.Lock(), 0
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                with suppress(OSError):
                    owner._answer(self)

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_port}/v1"

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        mode = self.mode
        with self._lock:
            self._number += 1
            number = self._number
        if mode == "dead":
            request.close_connection = True
            request.connection.close()
            return
        if mode in ("errors", "busy"):
            _send(request, 500 if mode == "errors" else 429, b'{"error": {"message": "not now"}}')
            return
        time.sleep(self._slow_seconds if mode == "slow" else self._seconds)
        if mode == "lying":
            _send(request, 200, LIES[number % len(LIES)])
            return
        key = prompt_key(body["messages"])
        schema = ((body.get("response_format") or {}).get("json_schema") or {}).get("schema")
        call = {
            "call_key": key,
            "row_id": "",
            "messages": json.dumps(body["messages"]),
            "schema": json.dumps(schema) if schema else "",
        }
        reply = scripted_reply(call, "fluent")
        message = {"role": "assistant", "content": reply["reply"]}
        used = {"prompt_tokens": reply["prompt_tokens"], "completion_tokens": reply["generated_tokens"]}
        _send(
            request,
            200,
            json.dumps(
                {
                    "id": str(number),
                    "object": "chat.completion",
                    "created": 0,
                    "model": body["model"],
                    "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                    "usage": {**used, "total_tokens": sum(used.values())},
                }
            ).encode(),
        )
        if mode != "slow":  # a slow answer may come after the caller has gone
            with self._lock:
                self.paid[key] += 1


def prompt_key(messages: list[dict[str, str]]) -> str:
    """A hash of the prompt."""
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest()


def _send(request: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    request.send_response(status)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


class Store:
    """The S3 server of moto on 127.0.0.1; the fraction `share` of its requests fails with 503."""

    def __init__(self) -> None:
        """Serve until the process ends."""
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Silent(WSGIRequestHandler):
            def log(self, *_: Any) -> None: ...

        self.share, self._random = 0.0, random.Random(0)
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True, request_handler=Silent)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def _serve(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if self.share and self._random.random() < self.share:
            start("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your rate</Message></Error>"]
        answered: Iterable[bytes] = self._moto(environ, start)
        return answered


@contextmanager
def failing(server: Any, name: str, value: Any, seconds: float) -> Iterator[None]:
    """Set an attribute of a server now, and reset it after some seconds or at the end."""
    before = getattr(server, name)
    setattr(server, name, value)
    timer = threading.Timer(seconds, setattr, (server, name, before))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        setattr(server, name, before)
