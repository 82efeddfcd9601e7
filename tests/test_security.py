"""Each promise in SECURITY.md names tests that exist; those that concern the whole project are tested here."""

import ast
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("flows", "operators", "kernels", "cluster")
SOURCES = sorted(file for package in PACKAGES for file in (REPOSITORY / package).rglob("*.py"))
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
READS_PICKLES = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "cloudpickle"}
RUNS_TEXT = {"eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load", "torch.load", "ray.cloudpickle.loads"}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_every_promise_names_a_test_that_exists() -> None:
    text = (REPOSITORY / "SECURITY.md").read_text()
    promises = [line for line in text.split("## Promises")[1].splitlines() if line.startswith("| ")][1:]
    assert len(promises) >= 12
    for line in promises:
        assert NAMED.search(line), f"names no test: {line}"
    for file, name in NAMED.findall(text):
        functions = {
            node.name
            for node in ast.walk(ast.parse((REPOSITORY / file).read_text()))
            if isinstance(node, ast.FunctionDef)
        }
        assert name in functions, f"{file} has no {name}"


def test_credentials_in_the_address_of_a_configured_source_are_not_passed_to_jobs(tmp_path: Path) -> None:
    """Ray's dashboard shows the environment of a job, in which the daemon passes on its overrides."""
    from flows.config import OVERRIDES_VARIABLE, load_config
    from flows.recycle_and_train import GRAPH
    from flows.run import open_run
    from flows.ui import server_environment

    smoke = (REPOSITORY / "configs/smoke.yaml").read_text()
    config = tmp_path / "mine.yaml"
    told = {}
    for path in (f"{tmp_path}/records", "s3://KEYID:PASSWORD@bucket/records"):
        config.write_text(re.sub(r"(?m)^  path: .*$", f"  path: {path}", smoke, count=1))
        run = open_run(load_config(config, [f"storage={tmp_path}/storage"]), GRAPH.specs)
        assert run.config.source.path == path
        told[path] = server_environment(run, config, [])[OVERRIDES_VARIABLE]
    local, remote = told.values()
    assert f'source.path="{tmp_path}/records"' in local
    assert "PASSWORD" not in remote


@pytest.mark.parametrize(
    "override",
    [
        "source.path=s3://KEYID:PASSWORD@bucket/records",
        "source.path=s3://bucket/records?secret_key=PASSWORD",
        "teacher.extra_body={api_key: PASSWORD}",
        "teacher.stages={judge: {extra_body: {token: PASSWORD}}}",
    ],
)
def test_credentials_in_overrides_of_the_daemon_are_refused(
    override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its jobs get the overrides in their environment, which Ray's dashboard shows."""
    from flows import ui
    from flows.config import OVERRIDES_VARIABLE, ConfigError, config_of_environment, require_public

    require_public([f"storage={tmp_path}", "teacher.api_key_env=MY_KEY", "teacher.max_tokens=7"])
    monkeypatch.setattr(ui, "_serve", lambda *_: pytest.fail("it was served"))
    assert ui.main(["--config", str(REPOSITORY / "configs/smoke.yaml"), f"storage={tmp_path}", override]) == 2
    key = override.partition("=")[0]
    printed = capsys.readouterr().err
    assert printed.startswith(f"{key}: its value holds a credential, and Ray's dashboard shows")
    assert "PASSWORD" not in printed
    monkeypatch.setenv(OVERRIDES_VARIABLE, shlex.join([override]))
    with pytest.raises(ConfigError, match=f"^{key}: its value holds a credential"):
        config_of_environment()


def test_no_message_of_a_flow_shows_credentials_in_the_address_of_the_source() -> None:
    for file in (REPOSITORY / "flows").glob("*.py"):
        texts = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FormattedValue)]
        raw = [text.lineno for text in texts if ast.unparse(text.value).endswith("source.path")]
        assert not raw, f"{file}:{raw}: it may hold credentials; use `shown`"


def test_nothing_here_reads_a_pickle_or_runs_a_text() -> None:
    """DeepSpeed's shards are the one exception; they carry digests and belong to this user alone."""
    for file in SOURCES:
        tree = ast.parse(file.read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {name.split(".")[0] for name in imported} & READS_PICKLES == set(), file
        for name, call in calls(tree):
            assert name not in RUNS_TEXT, f"{file}:{call.lineno}: {name}"
            shell = [keyword for keyword in call.keywords if keyword.arg == "shell"]
            assert not shell, f"{file}:{call.lineno}: a shell reads its text as commands"


def test_no_model_is_loaded_with_code_of_its_own() -> None:
    found = 0
    for file in SOURCES:
        for name, call in calls(ast.parse(file.read_text())):
            if re.fullmatch(r"Auto\w+\.from_pretrained", name):
                values = [ast.unparse(word.value) for word in call.keywords if word.arg == "trust_remote_code"]
                assert values == ["False"], f"{file}:{call.lineno}"
                found += 1
    assert found >= 8


SECRET = "sk-planted-0123456789abcdef"  # noqa: S105 - the secret that the test searches for


class Endpoint(BaseHTTPRequestHandler):
    """Refuses every call and repeats the key in its error, as careless services do; it also reads the process list."""

    command_lines: ClassVar[list[str]] = []
    keys: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        key = str(self.headers["Authorization"])
        self.keys.append(key)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                self.command_lines.append(" ".join(process.cmdline()))
        body = json.dumps(
            {"error": {"message": f"Incorrect API key provided: {key}", "code": "invalid_api_key"}}
        ).encode()
        self.send_response(401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.mark.slow
def test_a_planted_secret_is_found_nowhere(tmp_path: Path) -> None:
    """The key of an endpoint and the URL of a webhook are in no storage, log, Ray folder, output or process list."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "source.jsonl").write_text(json.dumps({"instruction": "Name a river.", "output": "The Rhine."}) + "\n")
    ray_folder = Path(f"/tmp/sec-{os.getpid()}")  # it contains sockets, so its path must be short
    settings = [
        *(f"storage={tmp_path / 'storage'}", f"source.path={tmp_path / 'source.jsonl'}", "source.held_out_fraction=0"),
        *("teacher.backend=openai", "teacher.model=m", f"teacher.base_url=http://127.0.0.1:{server.server_port}/v1"),
        *("teacher.api_key_env=PLANTED_KEY", "--select", "raw_instructions,instruction_reflections"),
    ]
    environment = {
        **os.environ,
        "PLANTED_KEY": SECRET,
        "RECYCLE_ALERT_URL": f"https://hooks.example/{SECRET}",
        "RAY_TMPDIR": str(ray_folder),
        "RAY_ADDRESS": "local",
    }
    ray_folder.mkdir()
    try:
        flow = [sys.executable, str(REPOSITORY / "flows/recycle_and_train.py"), "--config", "configs/smoke.yaml"]
        done = subprocess.run(
            [*flow, *settings],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 1, done.stderr
        logs = "".join(file.read_text()[-3000:] for file in (tmp_path / "storage" / "logs").glob("*.log"))
        assert f"Bearer {SECRET}" in Endpoint.keys, f"the key was not used: {done.stdout}{done.stderr}{logs}"
        files = [file for top in (tmp_path, ray_folder) for file in top.rglob("*") if file.is_file()]
        places = {file: file.read_bytes() for file in files}
        assert len([file for file in places if ray_folder in file.parents]) > 20
        assert [str(file) for file, content in places.items() if SECRET.encode() in content] == []
        assert SECRET not in done.stdout + done.stderr
        assert [line for line in Endpoint.command_lines if SECRET in line] == []
    finally:
        server.shutdown()
        server.server_close()
        subprocess.run(["rm", "-rf", str(ray_folder)], check=False)
