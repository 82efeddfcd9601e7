"""The push to the hub, tested with a fake of its API on 127.0.0.1 that keeps the files of a commit."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from operators.publish.hub import push_folder

REPOSITORY = Path(__file__).resolve().parents[3]
TOKEN = "hf_not_a_real_token"  # noqa: S105
COMMIT = "/datasets/me/data/commit/" + "1" * 40


class Hub(BaseHTTPRequestHandler):
    """The part of the API that an upload uses; the server object holds repositories, blobs and requests."""

    server: Any

    def do_POST(self) -> None:
        self._note()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.refuses:
            return self._answer({"error": "You have no right to write here"}, 403)
        if self.path == "/api/repos/create":
            created = json.loads(body)
            self.server.repositories.append(created)
            return self._answer({"url": f"{self.server.address}/datasets/{created['organization']}/{created['name']}"})
        if self.path == "/api/validate-yaml":  # the hub checks the header of the card
            return self._answer({"warnings": [], "errors": []})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "lfs" if n.endswith(".parquet") else "regular"} for n in names]
            return self._answer({"files": [mode | {"shouldIgnore": False, "oid": None} for mode in modes]})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                item | {"actions": {"upload": {"href": f"{self.server.address}/blobs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            self._commit([json.loads(line) for line in body.splitlines()])
            return self._answer({"commitUrl": f"{self.server.address}{COMMIT}", "commitOid": "1" * 40, "success": True})
        return self._answer({"error": self.path}, 404)

    def do_PUT(self) -> None:
        self._note()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.blobs[hashlib.sha256(content).hexdigest()] = content
        self._answer({})

    def do_GET(self) -> None:
        self._note()
        if "/tree/" in self.path:
            files = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in self.server.files]
            return self._answer(files)
        info = {"id": "me/data", "sha": "0" * 40, "private": True, "siblings": [], "tags": []}
        return self._answer(info | {"siblings": [{"rfilename": name} for name in self.server.files]})

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.server.files[value["path"]]

    def _note(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))

    def _answer(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.repositories, server.blobs, server.files, server.tokens, server.refuses = [], {}, {}, set(), False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in (("README.md", "card"), ("parquet/2.parquet", "new rows"), ("alpaca/2.jsonl", "{}\n")):
        path = tmp_path / "published" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "published"


def push(folder: Path, hub: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """Push in a separate process, because the client reads the address of the hub when it is imported."""
    code = (
        "import sys; from pyarrow import fs; from operators.publish.hub import push_folder\n"
        "print(push_folder(fs.LocalFileSystem(), sys.argv[1], 'me/data', private=True))"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings = {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(
        command, cwd=REPOSITORY, env=kept | settings, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_repository_holds_exactly_the_folder(folder: Path, hub: Any) -> None:
    hub.files |= {"parquet/1.parquet": b"old rows", ".gitattributes": b"x"}
    done = push(folder, hub, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.address}{COMMIT}"
    assert hub.files == {
        ".gitattributes": b"x",
        "README.md": b"card",
        "parquet/2.parquet": b"new rows",
        "alpaca/2.jsonl": b"{}\n",
    }
    [created] = hub.repositories
    assert (created["name"], created["organization"], created["type"]) == ("data", "me", "dataset")
    assert created.get("private") or created.get("visibility") == "private"
    assert f"Bearer {TOKEN}" in hub.tokens


def test_a_hub_that_refuses_is_named_and_the_token_is_not(folder: Path, hub: Any) -> None:
    hub.refuses = True
    done = push(folder, hub, HF_TOKEN=TOKEN)
    assert done.returncode == 1
    assert f"ValueError: publish.hub_repo: me/data at {hub.address}" in done.stderr
    assert TOKEN not in done.stderr + done.stdout


def test_without_a_token_nothing_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ValueError, match="the environment has no HF_TOKEN"):
        push_folder(fs.LocalFileSystem(), str(folder), "me/data", private=True)
