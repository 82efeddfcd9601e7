"""Data sets on the Hugging Face hub, `hf://datasets/<owner>/<name>`, are read: tested with a fake of its API."""

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
COMMIT = "1" * 40
READ = """
import json, os, sys, urllib.request
from operators.read.record_formats import read_records
from operators.read.source_files import files_of_other_splits, list_source_files, plan_pieces
list_source_files(sys.argv[1])
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/arrive").close()
files = list_source_files(sys.argv[1], sys.argv[2])
records = [record.value for task in plan_pieces([file.path for file in files], 1 << 20) for piece in task
           for record in read_records(piece)]
print(json.dumps([[file.name for file in files], [file.path for file in files], records,
                  files_of_other_splits(sys.argv[1], sys.argv[2])]))
"""


class Hub(BaseHTTPRequestHandler):
    """The part of the API that listing and reading use; the server object holds files by path."""

    server: Any

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.tokens.add(self.headers.get("Authorization"))
        if path == "/arrive":
            self.server.files |= self.server.arriving
            return self._answer({})
        if "/resolve/" in path:
            return self._file(path)
        if "/tree/" in path:
            return self._answer(self._below(path.partition("/tree/")[2].partition("/")[2]))
        if path.startswith("/api/datasets/me/data"):
            return self._answer({"id": "me/data", "sha": COMMIT, "private": False, "siblings": [], "tags": []})
        return self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        wanted = json.loads(body)["paths"] if body.startswith("{") else re.findall(r"paths=([^&]*)", body)
        names = [name.replace("%2F", "/") for name in ([wanted] if isinstance(wanted, str) else wanted)]
        there = self._folders() | self.server.files.keys()
        self._answer([self._entry(name) for name in names if name in there])

    def _below(self, folder: str) -> list[dict[str, Any]]:
        """The entries below a folder, also those in folders of it if `recursive` is asked for."""
        start = f"{folder}/" if folder else ""
        within = [name for name in self._folders() | self.server.files.keys() if name.startswith(start)]
        is_recursive = "recursive=true" in self.path.lower()
        return [self._entry(name) for name in within if is_recursive or "/" not in name[len(start) :]]

    def _folders(self) -> set[str]:
        return {name.rpartition("/")[0] for name in self.server.files} - {""}

    def _entry(self, name: str) -> dict[str, Any]:
        if name in self._folders():
            return {"type": "directory", "path": name, "oid": "2" * 40}
        content = self.server.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}  # noqa: S324

    def _file(self, path: str) -> None:
        name = path.partition("/resolve/")[2].partition("/")[2]
        content = self.server.files[name]
        first, last = 0, len(content) - 1
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(asked[1]), min(int(asked[2] or last), last)
        part = content[first : last + 1]
        self.send_response(206 if asked else 200)
        for key, value in (
            ("Content-Length", str(len(part))),
            ("Content-Range", f"bytes {first}-{last}/{len(content)}"),
            ("ETag", f'"{hashlib.sha256(content).hexdigest()}"'),
            ("X-Repo-Commit", COMMIT),
        ):
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part)

    def _answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.tokens = set()
    server.files = {
        "README.md": b"card",
        "data/train-0.jsonl": b'{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": "d"}\n',
        "data/test-0.jsonl": b'{"instruction": "x", "output": "y"}\n',
    }
    server.arriving = {"data/train-1.jsonl.gz": gzip.compress(b'{"instruction": "e", "output": "f"}\n')}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def read(hub: Any, path: str, split: str) -> subprocess.CompletedProcess[str]:
    """Read in a process of its own, because the client reads its settings when it is imported."""
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "hf_not_a_real_token",
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, "-c", READ, path, split]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("hf://datasets/me/data", ["data/train-0.jsonl", "data/train-1.jsonl.gz"]),
        ("hf://datasets/me/data/data/*-[01].*", ["train-0.jsonl", "train-1.jsonl.gz"]),
        ("hf://datasets/me/data@main/data/train-0.jsonl", ["train-0.jsonl"]),
    ],
)
def test_the_files_of_a_split_are_listed_and_read_also_those_that_came_since_an_earlier_look(
    hub: Any, path: str, names: list[str]
) -> None:
    done = read(hub, path, "train")
    assert done.returncode == 0, done.stderr
    found, paths, records, others = json.loads(done.stdout.splitlines()[-1])
    assert found == names
    assert all(each.startswith("hf://datasets/me/data") for each in paths)
    texts = {"data/train-0.jsonl": "ac", "train-0.jsonl": "ac", "data/train-1.jsonl.gz": "e", "train-1.jsonl.gz": "e"}
    assert "".join(record["instruction"] for record in records) == "".join(texts[name] for name in names)
    assert others == (
        {"test": ["data/test-0.jsonl"]}
        if path == "hf://datasets/me/data"
        else {"test": ["test-0.jsonl"]}
        if "*" in path
        else {}
    )
    assert "Bearer hf_not_a_real_token" in hub.tokens


def test_a_data_set_that_is_not_there_is_an_error_of_one_line(hub: Any) -> None:
    done = read(hub, "hf://datasets/me/none", "train")
    assert done.returncode != 0
    assert "ValueError: read_instructions: source.path: 'hf://datasets/me/none' matches no file" in done.stderr
