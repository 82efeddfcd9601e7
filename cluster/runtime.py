"""Joins the Ray cluster that is there, or starts one on this machine, and keeps its noise out of the terminal."""

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("flows", "operators", "kernels", "cluster")
JOB_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
UPLOADED_PACKAGE = "_ray_pkg_"
HOME_VARIABLE = "RECYCLE_HOME"
EXCLUDED_FROM_UPLOAD = [".git", ".venv", "runs", "docs", "tests", "benchmarks", "**/__pycache__"]


@contextmanager
def connected() -> Iterator[Path]:
    """Be connected to Ray while inside; yields the folder of Ray's logs. An existing connection is used and kept.

    With `RAY_ADDRESS`, inside a Ray job, or beside a cluster started by `ray start`, that cluster is joined; otherwise
    one is started for this process, listening on 127.0.0.1.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    already = ray.is_initialized()
    if not already:
        warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
        ray.init(
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False,
            runtime_env=None if _code_was_uploaded() else _runtime_env(),
        )
    _quiet()
    try:
        yield _logs_folder()
    finally:
        if not already:
            ray.shutdown()


def anchor(path: str) -> str:
    """Make a relative path absolute; refuse where it would lie in a copy that Ray deletes.

    A job submitted with `--working-dir` runs in an uploaded copy. Relative paths then mean `$RECYCLE_HOME`, else the
    directory where the cluster was started, which the driver inherits as `$PWD`.

    Raises:
        ValueError: the path is relative, the code was uploaded, and neither directory is known.
    """
    if "://" in path or Path(path).expanduser().is_absolute():
        return str(Path(path).expanduser()) if "://" not in path else path
    base = os.environ.get(HOME_VARIABLE) or str(Path.cwd())
    if UPLOADED_PACKAGE in base:
        base = os.environ.get("PWD", "")
    if not base or UPLOADED_PACKAGE in base:
        raise ValueError(
            f"storage: {path!r} is relative, and this job runs in an uploaded copy that Ray deletes; "
            f"give an absolute path or a URI, or set {HOME_VARIABLE}"
        )
    return str(Path(base) / path)


def cluster_resources() -> dict[str, float]:
    """Logical resources of the whole cluster, such as CPU and GPU."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources


def node_memory() -> list[float]:
    """Bytes of memory that Ray may hand out, a node."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"].get("memory", 0.0) for node in nodes if node["Alive"]]


def _logs_folder() -> Path:
    node = ray._private.worker.global_worker.node  # Ray has no public name for the folder of its logs
    return Path(node.get_logs_dir_path()) if node is not None else Path("/tmp/ray/session_latest/logs")  # noqa: S108


def _code_was_uploaded() -> bool:
    job = json.loads(os.environ.get(JOB_CONFIG_VARIABLE) or "{}")
    return bool((job.get("runtime_env") or {}).get("working_dir"))


def _runtime_env() -> dict[str, object]:
    """Workers must import this repository: by path on this machine, by upload on a cluster of others."""
    if os.environ.get("RAY_ADDRESS", "local") in ("", "local"):
        return {"env_vars": {"PYTHONPATH": str(REPOSITORY)}}
    if not (REPOSITORY / "pyproject.toml").is_file():  # installed: this is site-packages, which is gigabytes
        return {"py_modules": [str(REPOSITORY / package) for package in PACKAGES]}
    return {"working_dir": str(REPOSITORY), "excludes": EXCLUDED_FROM_UPLOAD}


def _quiet() -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
