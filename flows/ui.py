"""Runs the web UI, the daemon and a local Ray cluster for both, in the foreground until Ctrl-C: `python -m flows.ui`.

    python -m flows.ui [--config configs/demo.yaml] [dotted.key=value ...] [--port 3000]

The daemon launches refreshes as jobs of the cluster at $RAY_API_SERVER_ADDRESS. If nothing answers there, and the
address is on this machine, this command starts a cluster and stops it at its end.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn, TextIO
from urllib.parse import urlsplit

from cluster.dagster_home import RAY_DASHBOARD, open_instance
from cluster.files import StorageError
from cluster.local import answers, child, local_cluster, wait_for
from cluster.runtime import REPOSITORY
from flows.config import CONFIG_VARIABLE, OVERRIDES_VARIABLE, ConfigError, default_config, load_config, require_public
from flows.exit_codes import DONE, FAILED, UNUSABLE
from flows.recycle_and_train import GRAPH
from flows.run import Run, open_run
from flows.schedules import require_mounted
from operators.redact import without_credentials

MODULE = "flows.recycle_and_train"
RAY_ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
LOCATIONS = "{workspaceOrError {... on Workspace {locationEntries {locationOrLoadError {__typename}}}}}"
LOOK_S, MOST_WITHOUT_CODE = 15.0, 3  # time between looks at the code's process, and failed looks in a row
EARLY_S, MOST_EARLY = 120.0, 3  # a server that ends within this time, this often in a row, is not started again


def main(argv: Sequence[str], out: TextIO = sys.stdout) -> int:
    """Serve until Ctrl-C; returns 0, 1 if Dagster ends early too often, or 2 if the configuration cannot be used."""
    arguments = _parse(argv)
    try:
        require_public(arguments.override)
        run = open_run(load_config(arguments.config, arguments.override), GRAPH.specs)
        require_mounted(run)
    except (ConfigError, StorageError) as error:
        sys.stderr.write(f"{without_credentials(str(error))}\n")
        return UNUSABLE
    signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        _serve(run, arguments, out)
    except KeyboardInterrupt:
        out.write("stopped\n")
        return DONE
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        return FAILED


def _serve(run: Run, arguments: argparse.Namespace, out: TextIO) -> NoReturn:
    """Serve forever; if Dagster ends, it is started again, while Ray and a running refresh continue.

    Raises:
        RuntimeError: something did not start, or Dagster ended early too often.
    """
    environment = server_environment(run, arguments.config, arguments.override)
    early = 0
    _refuse_taken(arguments.port)
    with _cluster_for(run, environment, out):
        while True:
            started = time.monotonic()
            with _server_of(run, environment, arguments.port, out) as server:
                why = _end_of(server, f"http://127.0.0.1:{arguments.port}")
            early = early + 1 if time.monotonic() - started < EARLY_S else 0
            if early > MOST_EARLY:
                raise RuntimeError(f"{why}, several times in a row; its log is named above")
            out.write(f"{why}; it is started again\n")
            out.flush()


def _end_of(server: subprocess.Popen[bytes], url: str) -> str:
    """Wait until Dagster must be started again; return the reason.

    If the process with our code is killed, `dagster dev` keeps running, but its sensor never runs again.
    """
    without_code = 0
    while without_code < MOST_WITHOUT_CODE:
        with suppress(subprocess.TimeoutExpired):
            return f"Dagster ended with {server.wait(LOOK_S)}"
        without_code = without_code + 1 if lost_code(url) else 0
    return "Dagster lost the process that holds the code"


def lost_code(url: str) -> bool:
    """Whether the web server at `url` reports that it cannot load the code; False if it does not answer."""
    request = urllib.request.Request(  # noqa: S310 - http on this machine
        f"{url}/graphql", json.dumps({"query": LOCATIONS}).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=LOOK_S) as answer:  # noqa: S310
            entries = json.loads(answer.read())["data"]["workspaceOrError"].get("locationEntries", [])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return any((entry["locationOrLoadError"] or {}).get("__typename") == "PythonError" for entry in entries)


@contextmanager
def serving(
    run: Run, config: Path, overrides: Sequence[str], port: int, out: TextIO
) -> Iterator[subprocess.Popen[bytes]]:
    """Run web server and daemon while inside, and a cluster unless one answers; yields the process that runs both.

    Raises:
        RuntimeError: something did not start; the message names the log.
    """
    environment = server_environment(run, config, overrides)
    with _cluster_for(run, environment, out), _server_of(run, environment, port, out) as server:
        yield server


@contextmanager
def _cluster_for(run: Run, environment: Mapping[str, str], out: TextIO) -> Iterator[None]:
    """Use the cluster at $RAY_API_SERVER_ADDRESS, or run one on this machine while inside."""
    address = environment[RAY_ADDRESS_VARIABLE]
    if answers(f"{address}/api/version"):
        yield
        return
    out.write("starting a Ray cluster on this machine\n")
    out.flush()
    log = _logs_of(run) / "ray.log"
    with local_cluster(_port_here(address), log, cwd=REPOSITORY, environment=environment):
        yield


@contextmanager
def _server_of(run: Run, environment: Mapping[str, str], port: int, out: TextIO) -> Iterator[subprocess.Popen[bytes]]:
    url = f"http://127.0.0.1:{port}"
    _refuse_taken(port)
    with open_instance(Path(run.dagster_home)):
        pass
    logs = _logs_of(run)
    log = logs / "dagster.log"
    # Web server and daemon share one process with our code, which keeps running and caches what it read of the source.
    serve = ["dagster", "dev", "--host", "127.0.0.1", "--port", str(port), "-m", MODULE, "-d", str(REPOSITORY)]
    out.write(f"starting web server and daemon; their logs: {logs}\n")
    out.flush()
    with child(serve, log, cwd=REPOSITORY, environment=environment) as server:
        wait_for(url, log, server)
        out.write(f"assets: {url}/asset-groups\nRay: {environment[RAY_ADDRESS_VARIABLE]}\n")
        out.write("Ctrl-C stops what was started\n")
        out.flush()
        yield server


def _refuse_taken(port: int) -> None:
    if answers(f"http://127.0.0.1:{port}"):
        raise RuntimeError(f"port {port} of this machine is taken; give another by --port")


def _logs_of(run: Run) -> Path:
    logs = Path(run.dagster_home) / "server_logs"
    logs.mkdir(parents=True, exist_ok=True)
    return logs


def server_environment(run: Run, config: Path, overrides: Sequence[str]) -> dict[str, str]:
    """The variables that server, daemon and its jobs need; paths are absolute, because jobs run in other folders."""
    pinned = {
        "storage": run.config.storage,
        "teacher.model": run.config.teacher.model,
        "student.model": run.config.student.model,
    }
    if "://" not in run.config.source.path:  # a URI needs no change, and it must not be shown: Ray shows job settings
        pinned["source.path"] = run.config.source.path
    own = os.getcwd() if run.config.steps.functions else ""  # noqa: PTH109 - where the command line finds own functions
    return {
        **os.environ,
        "DAGSTER_HOME": run.dagster_home,
        CONFIG_VARIABLE: str(config.absolute()),
        OVERRIDES_VARIABLE: shlex.join([*overrides, *(f"{key}={json.dumps(value)}" for key, value in pinned.items())]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), own, os.environ.get("PYTHONPATH")])),
        RAY_ADDRESS_VARIABLE: os.environ.get(RAY_ADDRESS_VARIABLE, RAY_DASHBOARD),
    }


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m flows.ui", description="Serve the asset graph and run refreshes.")
    parser.add_argument("--config", type=Path, default=default_config(), help="YAML file (%(default)s)")
    parser.add_argument("override", nargs="*", help="dotted.key=value, such as schedule.active=true")
    parser.add_argument("--port", type=int, default=3000, help="of the web server on 127.0.0.1 (%(default)s)")
    return parser.parse_intermixed_args(argv)


def _port_here(address: str) -> int:
    """The port of an address on this machine.

    Raises:
        RuntimeError: the address is another machine's.
    """
    parts = urlsplit(address)
    if parts.hostname not in ("127.0.0.1", "localhost") or parts.port is None:
        raise RuntimeError(f"{RAY_ADDRESS_VARIABLE}: no Ray cluster answers at {address}")
    return parts.port


def _as_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
