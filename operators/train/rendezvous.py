"""Where the workers of a training find each other: torch's store, which listens on 127.0.0.1 if Ray does."""

import socket
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

from ray.train.torch import TorchConfig
from ray.util import get_node_ip_address


class RendezvousConfig(TorchConfig):
    """Ray Train's settings of the process group, with a store that is as reachable as the cluster."""

    @property
    def backend_cls(self) -> Any:
        """Ray Train's own back end, with one step before."""
        return _Backend


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute_single(0, listen_where_ray_does)
        super().on_start(worker_group, backend_config)


def listen_where_ray_does() -> None:
    """Make torch's store in this process listen on 127.0.0.1 alone, if that is the address of the node.

    torch itself listens on all interfaces of the machine, and its store obeys everyone who reaches it.
    """
    if str(get_node_ip_address()).startswith("127."):  # type: ignore[no-untyped-call]
        module: Any = import_module("torch.distributed.rendezvous")  # `torch.distributed` has a function of this name
        module.TCPStore = _on_one_address(module.TCPStore)


def _on_one_address(store: Callable[..., Any]) -> Callable[..., Any]:
    def listening(host_name: str, port: int, *, is_master: bool = False, **options: Any) -> Any:
        if is_master:
            listener = socket.socket()
            with suppress(OSError):  # torch shares a store of this process, or says that the port is taken
                listener.bind((host_name, port))
                listener.listen(socket.SOMAXCONN)
                options["master_listen_fd"] = listener.detach()
        return store(host_name=host_name, port=port, is_master=is_master, **options)

    return listening
