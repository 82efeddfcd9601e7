"""The web UI, the daemon and a local Ray cluster for both, in the foreground until Ctrl-C: `python -m flows.ui`.

    python -m flows.ui [--config configs/demo.yaml] [dotted.key=value ...] [--port 3000]

The daemon launches refreshes as jobs of the cluster at $RAY_API_SERVER_ADDRESS; if nothing answers there, and the
address is one of this machine, a cluster is started for as long as this command runs.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO
from urllib.parse import urlsplit

from cluster.dagster_home import RAY_DASHBOARD, open_instance
from cluster.local import answers, child, local_cluster, wait_for
from cluster.runtime import REPOSITORY
from flows.config import CONFIG_VARIABLE, OVERRIDES_VARIABLE, ConfigError, default_config, load_config
from flows.recycle_and_train import GRAPH
from flows.run import Run, open_run

DONE, FAILED, UNUSABLE = 0, 1, 2
MODULE = "flows.recycle_and_train"
RAY_ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"


def main(argv: Sequence[str], out: TextIO = sys.stdout) -> int:
    """Serve until Ctrl-C (0), or until Dagster ends by itself (1); 2 if the configuration cannot be used."""
    arguments = _parse(argv)
    try:
        run = open_run(load_config(arguments.config, arguments.override), GRAPH.specs)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return UNUSABLE
    signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        with serving(run, arguments.config, arguments.override, arguments.port, out) as server:
            server.wait()
            raise RuntimeError(f"Dagster ended with {server.returncode}; its log is named above")
    except KeyboardInterrupt:
        out.write("stopped\n")
        return DONE
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        return FAILED


@contextmanager
def serving(
    run: Run, config: Path, overrides: Sequence[str], port: int, out: TextIO
) -> Iterator[subprocess.Popen[bytes]]:
    """Web server and daemon while inside, and a cluster unless there is one; yields the process that runs both.

    Raises:
        RuntimeError: something did not start; the message names the log.
    """
    if answers(f"http://127.0.0.1:{port}"):
        raise RuntimeError(f"port {port} of this machine is taken; give another by --port")
    home = Path(run.dagster_home)
    with open_instance(home):
        pass
    logs = home / "server_logs"
    logs.mkdir(exist_ok=True)
    environment = server_environment(run, config, overrides)
    address, url = environment[RAY_ADDRESS_VARIABLE], f"http://127.0.0.1:{port}"
    # Web server and daemon share one process with our code, which stays up and keeps what it knows of the source.
    serve = ["dagster", "dev", "--host", "127.0.0.1", "--port", str(port), "-m", MODULE, "-d", str(REPOSITORY)]
    with ExitStack() as stack:
        if not answers(f"{address}/api/version"):
            out.write("starting a Ray cluster on this machine\n")
            cluster = local_cluster(_port_here(address), logs / "ray.log", cwd=REPOSITORY, environment=environment)
            stack.enter_context(cluster)
        out.write(f"starting web server and daemon; their logs: {logs}\n")
        out.flush()
        log = logs / "dagster.log"
        server = stack.enter_context(child(serve, log, cwd=REPOSITORY, environment=environment))
        wait_for(url, log, server)
        out.write(f"assets: {url}/asset-groups\nRay: {address}\nCtrl-C stops what was started\n")
        out.flush()
        yield server


def server_environment(run: Run, config: Path, overrides: Sequence[str]) -> dict[str, str]:
    """What server, daemon and the jobs of the daemon need to know; paths are absolute, for jobs run elsewhere."""
    pinned = {
        "storage": run.config.storage,
        "source.path": run.config.source.path,
        "teacher.model": run.config.teacher.model,
        "student.model": run.config.student.model,
    }
    return {
        **os.environ,
        "DAGSTER_HOME": run.dagster_home,
        CONFIG_VARIABLE: str(config.absolute()),
        OVERRIDES_VARIABLE: shlex.join([*overrides, *(f"{key}={json.dumps(value)}" for key, value in pinned.items())]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
        RAY_ADDRESS_VARIABLE: os.environ.get(RAY_ADDRESS_VARIABLE, RAY_DASHBOARD),
    }


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m flows.ui", description="Serve the asset graph and run refreshes.")
    parser.add_argument("--config", type=Path, default=default_config(), help="YAML file (%(default)s)")
    parser.add_argument("override", nargs="*", help="dotted.key=value, such as schedule.active=true")
    parser.add_argument("--port", type=int, default=3000, help="of the web server on 127.0.0.1 (%(default)s)")
    return parser.parse_intermixed_args(argv)


def _port_here(address: str) -> int:
    """Port of an address of this machine.

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
