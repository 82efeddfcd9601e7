"""Relative paths never end up in a copy of the code that Ray deletes."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest

from cluster import runtime
from cluster.runtime import JOB_CONFIG_VARIABLE, _runtime_env, anchor, local_part
from operators.files.places import ENDPOINT_VARIABLE, PASSED_TO_WORKERS

PACKAGE = "/tmp/ray/session/runtime_resources/working_dir_files/_ray_pkg_1234"


def test_a_relative_path_is_taken_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RECYCLE_HOME", raising=False)
    assert anchor("runs/demo") == str(tmp_path / "runs/demo")


def test_absolute_paths_and_uris_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECYCLE_HOME", "/elsewhere")
    assert anchor("/data/runs") == "/data/runs"
    assert anchor("file:///data/runs") == "/data/runs"


def test_local_files_of_a_storage_in_a_bucket_are_on_a_disk_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/var/lib/me")
    assert local_part("/data/runs") == "/data/runs"
    assert local_part("s3://bucket/runs/a") == "/var/lib/me/recycle-and-train/bucket/runs/a"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert local_part("s3://bucket") == str(Path.home() / ".local/state/recycle-and-train/bucket")


@pytest.mark.parametrize(
    ("job", "told"),
    [
        ({"working_dir": "gcs://x.zip"}, {"env_vars": {ENDPOINT_VARIABLE: "http://store:1"}}),
        ({"working_dir": "gcs://x.zip", "env_vars": {ENDPOINT_VARIABLE: "http://store:1"}}, None),
    ],
)
def test_workers_of_a_job_get_the_address_of_the_store_unless_the_job_sets_one(
    job: dict[str, object], told: dict[str, object] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in PASSED_TO_WORKERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(ENDPOINT_VARIABLE, "http://store:1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SECRET")
    monkeypatch.setenv(JOB_CONFIG_VARIABLE, json.dumps({"runtime_env": job}))
    assert _runtime_env() == told


def test_in_an_uploaded_copy_the_home_is_where_the_cluster_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "cwd", lambda: Path(PACKAGE))
    monkeypatch.delenv("RECYCLE_HOME", raising=False)
    monkeypatch.setattr("cluster.runtime._folder_of_raylet", lambda: "/home/me/project")
    assert anchor("runs/demo") == "/home/me/project/runs/demo"
    monkeypatch.setenv("RECYCLE_HOME", "/data")
    assert anchor("runs/demo") == "/data/runs/demo"


def test_in_an_uploaded_copy_without_a_home_a_relative_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "cwd", lambda: Path(PACKAGE))
    monkeypatch.delenv("RECYCLE_HOME", raising=False)
    monkeypatch.setenv("PWD", "/home/me/project")  # Ray's value for it does not help
    with pytest.raises(ValueError, match="storage: 'runs/demo' is relative, and this job runs in an uploaded copy"):
        anchor("runs/demo")


@pytest.mark.parametrize("address", [None, "local"])
def test_a_node_that_registers_late_is_waited_for_and_one_that_never_does_is_one_line(
    address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself gives a node that it starts 30 s, which a busy machine exceeds, and ends with a traceback."""
    looks = []

    def ask(gcs_address: str, node_id: str) -> dict[str, str]:
        looks.append(node_id)
        if len(looks) < 3:
            raise RuntimeError("not registered")
        return {"node_id": node_id}

    monkeypatch.setattr(runtime.services, "get_node", ask)
    monkeypatch.setattr(runtime, "POLL_S", 0.0)
    monkeypatch.setattr(runtime.ray, "init", lambda **_: runtime.services.get_node("gcs", "node"))
    runtime._start_or_join(address)
    assert looks == ["node"] * 3
    assert runtime.services.get_node is ask

    def late(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could happen")

    monkeypatch.setattr(runtime.ray, "init", late)
    with pytest.raises(runtime.ClusterError, match=rf"^ray: it did not start within {runtime.START_S:g} s on this"):
        runtime._start_or_join(address)


def test_a_cluster_that_does_not_answer_is_named_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = runtime.services.get_node

    def refused(**_: object) -> None:
        assert runtime.services.get_node is ask, "patience is for a node of our own"
        raise ConnectionError("ray client connection timeout\nmore")

    monkeypatch.setattr(runtime.ray, "init", refused)
    with pytest.raises(runtime.ClusterError, match=r"^ray: no cluster answers at head:6379 \(ray client .*timeout\)"):
        runtime._start_or_join("head:6379")


@pytest.mark.slow
def test_a_node_whose_agent_is_slow_starts(tmp_path: Path) -> None:
    slow = "import sys, time\nif any('dashboard/agent.py' in part for part in sys.orig_argv): time.sleep(17)\n"
    (tmp_path / "sitecustomize.py").write_text(slow)
    script = "import ray\nfrom cluster.runtime import connected\nwith connected(): print(len(ray.nodes()), 'node')"
    told = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{runtime.REPOSITORY}"}
    done = subprocess.run([sys.executable, "-c", script], env=told, capture_output=True, text=True, timeout=240)
    assert "1 node" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("address", "node", "mode", "status", "exposed"),
    [
        ("127.0.0.1:6379", "127.0.0.1", "", 200, False),
        ("127.0.0.1:6379", "10.0.0.7", "", 200, True),  # `ray start` without a token, joined at loopback
        ("127.0.0.1:6379", "10.0.0.7", "token", 401, False),
        ("10.0.0.7:6379", "10.0.0.7", "", 401, True),
        ("10.0.0.7:6379", "10.0.0.7", "token", 401, False),
        ("10.0.0.7:6379", "10.0.0.7", "token", 200, True),
    ],
)
def test_a_cluster_is_open_unless_it_refuses_a_request_without_a_token(
    address: str, node: str, mode: str, status: int, exposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/api/jobs/"
            assert self.headers["Authorization"] is None
            self.send_response(status)
            self.end_headers()

    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setattr(runtime.ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=address))
    monkeypatch.setattr(runtime.ray, "nodes", lambda: [{"Alive": True, "NodeManagerAddress": node}])
    with HTTPServer(("127.0.0.1", 0), Dashboard) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(runtime, "_dashboard", lambda: f"127.0.0.1:{server.server_port}")
        assert runtime.exposed_address() == ("10.0.0.7:6379" if exposed else None)
        server.shutdown()
    monkeypatch.setattr(runtime, "_dashboard", lambda: "")
    assert not runtime._answers_strangers(""), "a cluster without a dashboard"
