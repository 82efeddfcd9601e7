"""Starts a Ray cluster of one node and other processes on this machine, and stops them with all their children."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

POLL_S = 0.5
GRACE_S = 10.0  # between asking a process to end and killing it
START_S = 300.0
PORTS_OF_CLUSTER = 500  # one worker needs one
ALL_PORTS = range(20_000, 32_000, PORTS_OF_CLUSTER)  # above Ray's own range, below those that Linux gives to clients
PATIENCE = {  # Ray's 30 s and 60 s are too short on a busy machine
    "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": f"{START_S:g}",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": f"{START_S:g}",
    "RAY_gcs_server_port_wait_time_s": f"{START_S:g}",
}


# All of a node's ports on 127.0.0.1: see `cluster.runtime`. Libraries that workers use bind to the same interface.
LOOPBACK_ONLY = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_HOST_IP": "127.0.0.1",
}


@contextmanager
def child(
    command: Sequence[str], log: Path, *, cwd: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command while inside, with its output in `log`; at the end it and all processes it started are ended.

    The folder of this interpreter is first on its PATH. A Ctrl-C in the terminal does not reach it.
    """
    inherited = dict(os.environ if environment is None else environment)
    path = os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)])
    executable = shutil.which(command[0], path=path) or command[0]
    with log.open("ab") as output:
        process = subprocess.Popen(  # noqa: S603 - the caller's own command
            [executable, *command[1:]],
            cwd=cwd,
            env={**inherited, "PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End all processes that `child` started: by a request first, by a kill after a while."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)  # a server closes its own children in order if it is asked first
    asked: set[psutil.Process] = set()
    deadline = time.monotonic() + GRACE_S
    while family := _family(process.pid):
        for member in family - asked:
            _signal(member, signal.SIGTERM)
        asked |= family
        if time.monotonic() > deadline:
            for member in family:
                _signal(member, signal.SIGKILL)
        time.sleep(POLL_S)
    process.wait()


@contextmanager
def local_cluster(
    dashboard_port: int,
    log: Path,
    *,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
) -> Iterator[str]:
    """A cluster on this machine while inside, all ports on 127.0.0.1; yields the address of its dashboard and jobs API.

    Other clusters may run on this machine: only the dashboard has a fixed port, and all files, also Ray's record of
    the default cluster, are in a temporary folder that is deleted at the end. Jobs without a working directory run in
    `cwd`.

    Raises:
        RuntimeError: it did not come up; the message names the log.
    """
    ports = [f"--{name}={free_port()}" for name in ("port", "dashboard-agent-listen-port", "ray-client-server-port")]
    dashboard = ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"]
    # Not --block: it ends the cluster if Ray's client server, which is not used here, times out on a slow start.
    command = ["ray", "start", "--head", "--disable-usage-stats", *dashboard, *ports, *options]
    address = f"http://127.0.0.1:{dashboard_port}"
    patient = {**PATIENCE, **(os.environ if environment is None else environment), **LOOPBACK_ONLY}
    # Ray's sockets lie in that folder, and the path of a socket has at most 107 characters.
    with (
        TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        own_ports() as workers,
        child([*command, *workers, f"--temp-dir={folder}"], log, cwd=cwd, environment=patient) as process,
    ):
        wait_for(f"{address}/api/version", log, process)
        if process.wait(2 * START_S) != 0:
            raise RuntimeError(f"`ray start` ended with {process.returncode}; see {log}")
        yield address


def wait_for(url: str, log: Path, process: subprocess.Popen[bytes]) -> None:
    """Return as soon as a server that was just started answers.

    Raises:
        RuntimeError: its process ended, or it did not answer in time; the message names the log.
    """
    deadline = time.monotonic() + START_S
    while not answers(url):
        if process.poll():
            raise RuntimeError(f"the server of {url} ended with {process.returncode}; see {log}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{url} did not answer within {START_S:g} s; see {log}")
        time.sleep(POLL_S)


def answers(url: str) -> bool:
    """Whether a server responds, with any status."""
    try:
        with urllib.request.urlopen(url, timeout=5):  # noqa: S310 - http on this machine, or what the user configured
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def own_ports() -> Iterator[list[str]]:
    """Options of `ray start` for ports of workers that no other cluster started here has while inside.

    Each raylet gives its workers the first ports of its range, without a look at what other raylets of the machine
    gave. A block belongs to the process that has bound its first port, and is free again when that process ends.

    Raises:
        RuntimeError: all blocks are taken.
    """
    with socket.socket() as owner:
        first = next((port for port in ALL_PORTS if _bound(owner, port)), None)
        if first is None:
            taken = f"all {len(ALL_PORTS)} blocks of {PORTS_OF_CLUSTER} ports from {ALL_PORTS.start} on"
            raise RuntimeError(f"cluster: {taken} belong to other clusters of this machine; stop one of them")
        yield [f"--min-worker-port={first + 1}", f"--max-worker-port={first + PORTS_OF_CLUSTER - 1}"]


def _bound(owner: socket.socket, port: int) -> bool:
    with suppress(OSError):
        owner.bind(("127.0.0.1", port))
        return True
    return False


def _family(leader: int) -> set[psutil.Process]:
    """The processes of the session that `leader` opened, also after its end, and all their descendants."""
    family: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == leader:
                family |= {process, *process.children(recursive=True)}
    return {member for member in family if _is_alive(member)}


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


if __name__ == "__main__":  # `python -m cluster.local URL`: wait until a server answers; exit code 1 if it does not
    deadline = time.monotonic() + START_S
    while not answers(sys.argv[1]):
        if time.monotonic() > deadline:
            sys.exit(f"{sys.argv[1]} did not answer within {START_S:g} s")
        time.sleep(POLL_S)
