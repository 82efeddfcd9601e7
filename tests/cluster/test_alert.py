"""Alerts reach webhook and command, and failures are reported without the URL, which may be a secret."""

import http.server
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.alert import send_alert

VARIABLE = "ALERT_URL_OF_TESTS"
MESSAGE = {"text": "refresh a was given up", "attempts": 3}


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[bytes]]]:
    """A URL and the bodies posted to it. If the path ends in a number, that is the status of the response."""
    got: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(int(self.path[-3:]) if self.path[-3:].isdigit() else 204)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def do_GET(self) -> None:
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/secret-path", got
    server.shutdown()
    server.server_close()


def test_nothing_configured_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert send_alert(MESSAGE, VARIABLE, ()) == []


def test_both_get_the_message(
    tmp_path: Path, webhook: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, got = webhook
    monkeypatch.setenv(VARIABLE, url)
    file = tmp_path / "alert"
    command = (sys.executable, "-c", f"import sys; open({str(file)!r}, 'w').write(sys.stdin.read())")
    assert send_alert(MESSAGE, VARIABLE, command) == []
    assert json.loads(got[0]) == json.loads(file.read_text()) == MESSAGE


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("{webhook}500", f"the webhook of ${VARIABLE} answered 500"),
        ("{webhook}302", f"the webhook of ${VARIABLE} answered 302"),
        ("http://127.0.0.1:1/secret-path", f"the webhook of ${VARIABLE} cannot be reached: URLError"),
        ("file:///etc/secret-path", f"${VARIABLE} holds no http or https URL"),
        ("http://[secret-path", f"the webhook of ${VARIABLE} cannot be reached: ValueError"),
        ("http://127.0.0.1/secret path", f"the webhook of ${VARIABLE} cannot be reached: InvalidURL"),
    ],
)
def test_a_webhook_that_fails_is_reported_without_its_address(
    url: str, said: str, webhook: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, url.format(webhook=webhook[0]))
    assert send_alert(MESSAGE, VARIABLE, ()) == [said]


def test_a_command_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert send_alert(MESSAGE, VARIABLE, ("false",)) == ["schedule.alert_command: false ended with 1"]


def test_a_command_may_print_any_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    print_bytes = "import sys; sys.stdin.read(); sys.stdout.buffer.write(bytes([255]))"
    assert send_alert(MESSAGE, VARIABLE, (sys.executable, "-c", print_bytes)) == []
    assert send_alert(MESSAGE, VARIABLE, ("\0",)) == ["schedule.alert_command: \0: ValueError"]
