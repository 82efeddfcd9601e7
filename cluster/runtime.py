"""Joins a running Ray cluster, or starts one on this machine, and keeps its output out of the terminal."""

import json
import logging
import os
import time
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from inspect import signature
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import ray_constants, services
from ray._raylet import DASHBOARD_AGENT_LISTEN_PORT_NAME, persist_port  # type: ignore[attr-defined]

from cluster.local import LOOPBACK_ONLY, PATIENCE, POLL_S, START_S, free_port
from operators.files.places import BUCKETS, in_bucket, require_place, store_environment

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("flows", "operators", "kernels", "cluster")
JOB_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
UPLOADED_PACKAGE = "_ray_pkg_"
DASHBOARD_S = 5.0  # longest wait for an answer of the dashboard
HOME_VARIABLE = "RECYCLE_HOME"
NO_ADDRESS = (None, "", "local")  # values of the address that mean to start a cluster instead of joining one
AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port")
EXCLUDED_FROM_UPLOAD = [".git", ".venv", "runs", "docs", "tests", "benchmarks", "**/__pycache__"]


class ClusterError(RuntimeError):
    """No Ray cluster can be joined or started; the message, of one line, says why."""


@contextmanager
def connected() -> Iterator[Path]:
    """Connect to Ray while inside; yields the folder of Ray's logs. An existing connection is used and kept.

    This joins the cluster of `RAY_ADDRESS`, of the Ray job that this process is in, or of a `ray start` on this
    machine. If there is none, it starts a cluster for this process, with all ports on 127.0.0.1.

    Raises:
        ClusterError: the cluster does not start in time, or none answers at the address.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    already = ray.is_initialized()
    if not already:
        warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
        address = services.get_ray_address_from_environment(None, None)  # type: ignore[arg-type]
        if _is_of_this_machine(address):
            _listen_on_loopback_only()
        _start_or_join(address)
    _quiet()
    try:
        yield _logs_folder()
    finally:
        if not already:
            ray.shutdown()


def _start_or_join(address: str | None) -> None:
    for name, seconds in PATIENCE.items():
        os.environ.setdefault(name, seconds)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    try:
        if address in NO_ADDRESS:
            with patient_start(), _code_for_workers():
                ray.init(**quiet)
        else:
            ray.init(**quiet, runtime_env=_runtime_env())
    except ConnectionError as error:
        why = f"{error}".splitlines()[0] if str(error) else "no answer"
        raise ClusterError(f"ray: no cluster answers at {address} ({why}); start it, or unset RAY_ADDRESS") from None
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        raise ClusterError(
            f"ray: it did not start within {START_S:g} s on this machine; run the command again when less else runs"
        ) from None


@contextmanager
def _code_for_workers() -> Iterator[None]:
    """Let all processes that are started inside, and so all workers of a cluster, import this repository.

    With a `runtime_env`, which is for clusters of others, Ray would not use the workers that it starts in advance, and
    would start Python twice for each worker, because a program of its own sets the variables: 0.5 s of CPU each.
    """
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), before]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@contextmanager
def patient_start() -> Iterator[None]:
    """Give a node that this process starts more time than Ray's fixed limits, because a busy machine needs it.

    The limits are 30 s for the node, and 15 s for each port of an agent that the raylet has to learn: it kills itself
    if the agent has not written the file with the port by then (ray-project/ray#65983). So the ports are given, and the
    file of the agent's job API, a port that the raylet always reads, is written with what an agent without one writes.
    """
    ask, start, deadline = services.get_node, services.start_raylet, time.monotonic() + START_S

    def ask_patiently(gcs_address: str, node_id: str) -> Any:
        while True:
            try:
                return ask(gcs_address, node_id)  # type: ignore[no-untyped-call]
            except RuntimeError:  # the node is not registered yet
                if time.monotonic() > deadline:
                    raise
            time.sleep(POLL_S)

    def start_with_ports(*arguments: Any, **options: Any) -> Any:
        call = signature(start).bind(*arguments, **options)
        call.arguments |= {name: call.arguments.get(name) or free_port() for name in AGENT_PORTS}
        told = call.arguments["session_dir"], call.arguments["node_id"], DASHBOARD_AGENT_LISTEN_PORT_NAME, -1
        persist_port(*told)
        return start(*call.args, **call.kwargs)

    services.get_node, services.start_raylet = ask_patiently, start_with_ports
    try:
        yield
    finally:
        services.get_node, services.start_raylet = ask, start


def anchor(path: str) -> str:
    """Make the storage's path absolute, but never a path in a copy that Ray deletes. A bucket's URI stays unchanged.

    A job submitted with `--working-dir` runs in an uploaded copy. Relative paths are then relative to `$RECYCLE_HOME`,
    or else to the directory where the cluster was started, which is the directory of the job's raylet.

    Raises:
        ValueError: the path cannot hold a storage; or it is relative, the code was uploaded, and neither directory is
            known.
    """
    path = require_place(path)
    if in_bucket(path) or Path(path).expanduser().is_absolute():
        return path if in_bucket(path) else str(Path(path).expanduser())
    base = os.environ.get(HOME_VARIABLE) or str(Path.cwd())
    if UPLOADED_PACKAGE in base:
        base = _folder_of_raylet() or ""
    if not base or UPLOADED_PACKAGE in base:
        raise ValueError(
            f"storage: {path!r} is relative, and this job runs in an uploaded copy that Ray deletes; "
            f"give an absolute path, or set {HOME_VARIABLE}"
        )
    return str(Path(base) / path)


def local_part(storage: str) -> str:
    """The folder for files that must be on a disk of this machine, such as SQLite and logs.

    It is the storage itself if that is a folder. For a bucket it is
    `$XDG_STATE_HOME/recycle-and-train/<bucket>/<prefix>`, by default under `~/.local/state`.
    """
    if not in_bucket(storage):
        return storage
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return str(Path(state) / "recycle-and-train" / storage.removeprefix(BUCKETS))


def cluster_nodes() -> list[dict[str, float]]:
    """Logical resources of each running node: CPU, GPU, memory (bytes that Ray may give to tasks) and its own names."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


def _folder_of_raylet() -> str | None:
    """The folder where `ray start` ran on this node; None outside a job. (A job's own `$PWD` is the uploaded copy.)"""
    with suppress(psutil.Error):
        return next((parent.cwd() for parent in psutil.Process().parents() if parent.name() == "raylet"), None)
    return None


def exposed_address() -> str | None:
    """The address at which anyone can run commands on the connected cluster; None if token or loopback protects it.

    That this process has a token does not show that the cluster asks for one, so its dashboard is asked without it.
    That this process reaches it at a loopback address does not show that nobody else does, so the addresses count under
    which its nodes are registered.
    """
    reached, _, port = str(ray.get_runtime_context().gcs_address).rpartition(":")
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    hosts = [reached.strip("[]"), *(str(node["NodeManagerAddress"]) for node in nodes if node["Alive"])]
    host = next((host for host in hosts if not _is_loopback(host)), None)
    if host is None:
        return None
    address = f"{host}:{port}"
    guarded = os.environ.get("RAY_AUTH_MODE") == "token" and not _answers_strangers(_dashboard())
    return None if guarded else address


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _dashboard() -> str:
    """Host and port of the cluster's dashboard; "" if it has none."""
    node = ray._private.worker.global_worker.node  # Ray's public name for it is deprecated
    return str(node.webui_url or "") if node is not None else ""


def _answers_strangers(dashboard: str) -> bool:
    """Whether the job API answers a request without a token; no dashboard answers nothing."""
    try:
        with urllib.request.urlopen(f"http://{dashboard}/api/jobs/", timeout=DASHBOARD_S) as answer:
            return bool(answer.status == HTTPStatus.OK)
    except (OSError, ValueError):  # also a refusal, such as 401
        return False


def _is_of_this_machine(address: str | None) -> bool:
    """Whether there is no cluster to join, or one whose address is loopback."""
    host = (address or "local").rpartition(":")[0] or "local"
    return host == "local" or _is_loopback(host.strip("[]"))


def _listen_on_loopback_only() -> None:
    """Make the cluster that this process starts, with all its processes, bind to 127.0.0.1.

    By default GCS, raylet, workers and the dashboard agent, whose job API runs commands for anyone, listen on all
    interfaces, and Ray replaces `--node-ip-address=127.0.0.1` by the address of an interface. Only Ray's switch that
    forbids clusters on macOS and Windows makes loopback the address of the node.
    """
    os.environ.update(LOOPBACK_ONLY)
    ray_constants.ENABLE_RAY_CLUSTER = False


def _logs_folder() -> Path:
    node = ray._private.worker.global_worker.node  # Ray has no public name for the folder of its logs
    return Path(node.get_logs_dir_path()) if node is not None else Path("/tmp/ray/session_latest/logs")  # noqa: S108


def _runtime_env() -> dict[str, object] | None:
    """The environment in which workers can import this repository and find buckets.

    On this machine the repository is given by path; other machines get an upload. Inside a job, variables that the job
    sets itself are left out, because Ray refuses to set them twice.
    """
    job = json.loads(os.environ.get(JOB_CONFIG_VARIABLE) or "{}").get("runtime_env") or {}
    told = {name: value for name, value in store_environment().items() if name not in job.get("env_vars", {})}
    code: dict[str, object] = {}
    if job.get("working_dir"):
        pass  # every worker has the job's copy
    elif os.environ.get("RAY_ADDRESS", "local") in ("", "local"):
        told["PYTHONPATH"] = str(REPOSITORY)
    elif not (REPOSITORY / "pyproject.toml").is_file():  # installed: REPOSITORY is site-packages, of gigabytes
        code = {"py_modules": [str(REPOSITORY / package) for package in PACKAGES]}
    else:
        code = {"working_dir": str(REPOSITORY), "excludes": EXCLUDED_FROM_UPLOAD}
    return (code | {"env_vars": told} if told else code) or None


def _quiet() -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
