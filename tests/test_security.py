"""Each promise in SECURITY.md names tests that exist; those that concern the whole project are tested here."""

import ast
import contextlib
import json
import os
import re
import shlex
import shutil
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import dagster as dg
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.local import free_port, local_cluster

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
        assert server_environment(run, config, [])["PYTHONPATH"].split(os.pathsep)[0] == str(REPOSITORY)
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
    hooks: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        key = str(self.headers["Authorization"])
        (self.hooks if self.path.startswith("/hook/") else self.keys).append(self.path if "hook" in self.path else key)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                self.command_lines.append(" ".join(process.cmdline()))
        body = json.dumps({"error": {"message": f"Incorrect API key provided: {key}", "code": "invalid"}}).encode()
        self.send_response(400)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def endpoint() -> Iterator[int]:
    """The port of an endpoint."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def content_of(file: Path) -> bytes:
    """The bytes of a file, and what is stored in the columns of a table, which are compressed."""
    content = file.read_bytes()
    if ".parquet" in file.name and content.startswith(b"PAR1"):
        content += json.dumps(pq.read_table(pa.BufferReader(content)).to_pylist(), default=str).encode()
    return content


@pytest.mark.slow
def test_a_planted_secret_is_found_nowhere(tmp_path: Path, endpoint: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of an endpoint and the URL of a webhook are in no storage, log, Ray folder, job or process list."""
    (tmp_path / "source.jsonl").write_text(json.dumps({"instruction": "Name a river.", "output": "The Rhine."}) + "\n")
    settings = [
        *(f"storage={tmp_path / 'storage'}", f"source.path={tmp_path / 'source.jsonl'}", "source.held_out_fraction=0"),
        *("teacher.backend=openai", "teacher.model=m", f"teacher.base_url=http://127.0.0.1:{endpoint}/v1"),
        "teacher.api_key_env=PLANTED_KEY",
    ]
    planted = {"PLANTED_KEY": SECRET, "RECYCLE_ALERT_URL": f"http://127.0.0.1:{endpoint}/hook/{SECRET}"}
    ray_folder = Path(f"/tmp/sec-{os.getpid()}")  # it contains sockets, so its path must be short
    ray_folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(ray_folder))
    flow = ["python", "flows/recycle_and_train.py", "--config", "configs/smoke.yaml", *settings]
    entrypoint = shlex.join([*flow, "--select", "raw_instructions,instruction_reflections"])
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | planted
    options = ["--num-cpus=2", "--object-store-memory=100000000"]
    try:
        with local_cluster(
            free_port(), tmp_path / "ray.log", cwd=REPOSITORY, environment=environment, options=options
        ) as address:
            jobs = JobSubmissionClient(address)
            job = jobs.submit_job(entrypoint=entrypoint)
            while jobs.get_job_status(job) not in (JobStatus.FAILED, JobStatus.SUCCEEDED, JobStatus.STOPPED):
                time.sleep(0.5)
            with urllib.request.urlopen(f"{address}/api/jobs/") as answer:  # noqa: S310 - http on this machine
                told = answer.read().decode() + jobs.get_job_logs(job)
            monkeypatch.setenv("RECYCLE_ALERT_URL", planted["RECYCLE_ALERT_URL"])
            alert_that_fails(settings)
            places = {file: content_of(file) for file in files_below(tmp_path, ray_folder)}
        assert '"driver_exit_code": 1' in told, told
        assert f"Bearer {SECRET}" in Endpoint.keys, f"the key was not used: {told}"
        assert f"/hook/{SECRET}" in Endpoint.hooks
        stored = [content for file, content in places.items() if ".parquet" in file.name]
        assert any(b"Incorrect API key provided" in content for content in stored), "the failure is in the ledger"
        assert len([file for file in places if ray_folder in file.parents]) > 20
        assert [str(file) for file, content in places.items() if SECRET.encode() in content] == []
        assert SECRET not in told
        assert [line for line in Endpoint.command_lines if SECRET in line] == []
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)


def files_below(*folders: Path) -> list[Path]:
    return [file for top in folders for file in top.rglob("*") if file.is_file()]


def alert_that_fails(settings: list[str]) -> None:
    """Let the daemon give a refresh up; the webhook refuses the alert, and the reason is stored."""
    from flows.config import load_config
    from flows.recycle_and_train import GRAPH
    from flows.refresh_requests import GivenUp, Request
    from flows.retries import decide
    from flows.run import open_run

    run = open_run(load_config(REPOSITORY / "configs/smoke.yaml", settings), GRAPH.specs)
    [file] = run.staleness.files.there()
    given_up = GivenUp(at="", attempts=3, reason="the disk is full")
    run.requests.put(Request(key="dead", files=((file.name, file.identity),), given_up=given_up))
    with dg.DagsterInstance.ephemeral() as instance:
        [said] = decide(instance, run).given_up
    assert "the alert was not delivered" in said
