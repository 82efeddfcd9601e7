"""torch's store can be reached from where Ray's ports can be reached, and from nowhere else."""

import os
from datetime import timedelta
from importlib import import_module
from typing import Any

import psutil
import pytest

from cluster.local import free_port
from operators.train import rendezvous as ours
from operators.train.rendezvous import RendezvousConfig, _Backend, listen_where_ray_does

TORCHS: Any = import_module("torch.distributed.rendezvous")


@pytest.fixture(autouse=True)
def torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the store's class back at the end."""
    monkeypatch.setattr(TORCHS, "TCPStore", TORCHS.TCPStore)


@pytest.mark.parametrize(("node", "loopback"), [("127.0.0.1", True), ("10.0.0.7", False)])
def test_the_store_listens_on_the_address_of_the_node(
    node: str, loopback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "get_node_ip_address", lambda: node)
    listen_where_ray_does()
    port = free_port()
    store, other = (TORCHS._create_c10d_store("127.0.0.1", port, rank, 1, timedelta(seconds=30)) for rank in (0, 1))
    other.set("key", "value")
    assert store.get("key") == b"value"
    sockets = psutil.Process(os.getpid()).net_connections("inet")
    [address] = {one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN and one.laddr.port == port}
    assert (address == "127.0.0.1") == loopback


def test_a_second_group_of_the_process_shares_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "get_node_ip_address", lambda: "127.0.0.1")
    listen_where_ray_does()
    port = free_port()
    first, again = (TORCHS._create_c10d_store("127.0.0.1", port, 0, 1, timedelta(seconds=30)) for _ in range(2))
    first.set("key", "value")
    assert again.get("key") == b"value"


def test_ray_train_is_told() -> None:
    assert RendezvousConfig(backend="gloo").backend_cls is _Backend
    assert RendezvousConfig(backend="gloo").to_dict()["backend"] == "gloo"
