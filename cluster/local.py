"""A Ray cluster of one node, and other processes, on this machine: started, waited for, and stopped without remains."""

import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

POLL_S = 0.5
GRACE_S = 20.0  # between asking a process to end and killing it
START_S = 180.0


@contextmanager
def child(
    command: Sequence[str], log: Path, *, cwd: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command while inside, its output in `log`; at the end it and all that it started are gone.

    The command is looked up beside this interpreter first. A Ctrl-C in the terminal does not reach it.
    """
    executable = shutil.which(command[0], path=str(Path(sys.executable).parent)) or command[0]
    with log.open("ab") as output:
        process = subprocess.Popen(  # noqa: S603 - the caller's own command
            [executable, *command[1:]],
            cwd=cwd,
            env=dict(environment) if environment is not None else None,
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
    """End a process and its descendants: asked first, killed after a while."""
    family = _family(process.pid)
    process.terminate()
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and process.poll() is None:
        family |= _family(process.pid)
        time.sleep(POLL_S)
    _, alive = psutil.wait_procs(family, timeout=max(POLL_S, deadline - time.monotonic()))
    for survivor in {*alive, *(grandchild for one in alive for grandchild in _family(one.pid))}:
        if survivor.is_running():
            survivor.kill()
    psutil.wait_procs(alive, timeout=GRACE_S)
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
    """A cluster of this machine while inside; yields the address of its dashboard and jobs API.

    Only the dashboard has a fixed port, so that it can stand beside other clusters. Jobs without a working directory
    of their own run in `cwd`.

    Raises:
        RuntimeError: it did not come up; the message names the log.
    """
    ports = [f"--{name}={free_port()}" for name in ("port", "dashboard-agent-listen-port", "ray-client-server-port")]
    loopback = ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"]
    command = ["ray", "start", "--head", "--block", "--disable-usage-stats", *loopback, *ports, *options]
    address = f"http://127.0.0.1:{dashboard_port}"
    with child(command, log, cwd=cwd, environment=environment) as process:
        wait_for(f"{address}/api/version", process, log)
        yield address


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float = START_S) -> None:
    """Return as soon as a process that was just started answers at an address.

    Raises:
        RuntimeError: it ended, or did not answer in time; the message names the log.
    """
    deadline = time.monotonic() + timeout_s
    while not answers(url):
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}; see {log}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{url} did not answer within {timeout_s:g} s; see {log}")
        time.sleep(POLL_S)


def answers(url: str) -> bool:
    """Whether a server is there, whatever it says."""
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


def _family(pid: int) -> set[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return {parent, *parent.children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()
