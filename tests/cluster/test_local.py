"""No socket of a run or of a local cluster that accepts commands can be reached from another machine."""

import os
import socket
import subprocess
import sys
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path

import psutil
import pytest

from cluster.local import ALL_PORTS, PORTS_OF_CLUSTER, answers, free_port, local_cluster, own_ports
from tests.cluster.sockets import is_loopback, listening

REPOSITORY = Path(__file__).resolve().parents[2]
RUN = """
import sys, time
from cluster.runtime import connected

with connected():
    import ray
    assert ray.get(ray.remote(lambda: 1).remote()) == 1
    print("connected", flush=True)
    sys.stdin.read()
"""

pytestmark = pytest.mark.slow


def address_of_host() -> str:
    """An address of this machine other than loopback."""
    found = (one.address for each in psutil.net_if_addrs().values() for one in each if one.family == socket.AF_INET)
    return next((address for address in found if not address.startswith("127.")), "")


def without_ray_address() -> dict[str, str]:
    return {**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(REPOSITORY)}


def test_every_socket_of_a_run_is_on_loopback() -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", RUN],
        env=without_ray_address(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    assert any(line.strip() == "connected" for line in iter(run.stdout.readline, ""))
    found = listening(psutil.Process(run.pid))
    run.communicate("")
    assert {"raylet", "gcs_server"} <= set(found.values())
    assert {place: name for place, name in found.items() if not is_loopback(place[0])} == {}


@pytest.mark.long  # `make test` looks at every socket of a run, and orders jobs from outside in test_ray_job.py
def test_a_local_cluster_takes_no_job_from_another_address(tmp_path: Path) -> None:
    host = address_of_host()
    if not host:
        pytest.skip("this machine has no address but loopback")
    port = free_port()
    with local_cluster(port, tmp_path / "ray.log", cwd=tmp_path, options=["--num-cpus=1"]) as address:
        [gcs] = [
            process
            for process in psutil.process_iter()
            if process.name() == "gcs_server" and str(tmp_path) in _folder(process)
        ]
        found = listening(gcs) | listening_of_session(gcs)
        assert port in {place[1] for place in found}
        assert {place: name for place, name in found.items() if not is_loopback(place[0])} == {}
        for _, open_port in found:
            for path in ("/api/job_agent/jobs/", "/api/jobs/"):
                with pytest.raises(ConnectionRefusedError):
                    order(host, open_port, path)
        assert answers(f"{address}/api/version")


def test_clusters_on_one_machine_have_ports_of_their_own() -> None:
    with own_ports() as ours, own_ports() as others:
        taken = [_ports(options) for options in (ours, others)]
        assert [len(ports) for ports in taken] == [PORTS_OF_CLUSTER - 1] * 2
        assert not set(taken[0]) & set(taken[1])
    with own_ports() as again:
        assert _ports(again) == taken[0], "a block is free again when its cluster has ended"


def test_no_block_of_ports_left_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.local.ALL_PORTS", ALL_PORTS[:0])
    with pytest.raises(RuntimeError, match="belong to other clusters"), own_ports():
        pass


def _ports(options: list[str]) -> range:
    first, last = (int(option.rpartition("=")[2]) for option in options)
    return range(first, last + 1)


def order(host: str, port: int, path: str) -> None:
    """Ask a server to run a command, as `ray job submit` does."""
    connection = HTTPConnection(host, port, timeout=10)
    connection.request("POST", path, '{"entrypoint": "true"}', {"Content-Type": "application/json"})
    connection.getresponse()


def _folder(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return str(process.cwd())
    return ""


def listening_of_session(member: psutil.Process) -> dict[tuple[str, int], str]:
    """Sockets of all processes of the session that `local_cluster` opened."""
    session, found = os.getsid(member.pid), {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == session:
                found |= listening(process)
    return found
