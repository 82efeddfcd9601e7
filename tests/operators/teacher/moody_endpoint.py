"""An endpoint on 127.0.0.1 whose prompts decide whether it answers, fails, refuses, is slow or returns nonsense."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

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
    "half an emoji": {"content": "clear \ud83d text"},  # json.dumps writes it as an escape, which no encoder refuses
    "in parts": {"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": "the answer"}]},
    "thought only": {"content": None, "reasoning_content": "the answer"},
    "cut in thoughts": {"content": None, "reasoning_content": "a draft"},
    "thought and said": {"content": "the answer", "reasoning_content": "let me see"},
}
USAGES: dict[str, dict[str, Any]] = {
    "null usage": {"usage": None},
    "zero usage": {"usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}},
    "huge usage": {"usage": {"prompt_tokens": 10**12, "completion_tokens": 10**12, "total_tokens": 10**12}},
}


class Endpoint(BaseHTTPRequestHandler):
    """Answers as the prompt asks: with a status code, a kind of garbage, slowly, or else with the reversed prompt.

    "once 429" gives that status the first time only; "429" gives it always.
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
            reason = "stop" if content == "thought only" else "length"
            choices = [{"index": 0, "finish_reason": reason, "message": message}]
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


@contextmanager
def serving() -> Iterator[str]:
    """The address of an endpoint that has not seen any request yet."""
    Endpoint.seen, Endpoint.most_busy = [], 0
    Endpoint.free.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            Endpoint.free.set()
            server.shutdown()
