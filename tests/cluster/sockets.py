"""Which sockets a process and its descendants listen on."""

from contextlib import suppress

import psutil


def listening(leader: psutil.Process) -> dict[tuple[str, int], str]:
    """(address, port) of every socket on which a process or one of its descendants listens, with the program's name."""
    found = {}
    for process in (leader, *leader.children(recursive=True)):
        with suppress(psutil.Error):
            sockets = process.net_connections("inet")
            found |= {tuple(one.laddr): process.name() for one in sockets if one.status == psutil.CONN_LISTEN}
    return found


def is_loopback(address: str) -> bool:
    return address in ("::1", "127.0.0.1", "::ffff:127.0.0.1")
