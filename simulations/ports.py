"""Ports for servers of this machine that are started in a moment."""

from __future__ import annotations

import secrets
import socket
from pathlib import Path

LOWEST = 12_000


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody uses at this moment, and that no outgoing connection will be given.

    Linux takes the local ports of connections from `ip_local_port_range`; a port from there can be gone before the
    server that it was meant for has started, and stays gone as long as that connection lives.
    """
    found: dict[int, None] = {}
    while len(found) < count:
        port = secrets.choice(range(LOWEST, _first_ephemeral()))
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found[port] = None
    return list(found)


def free_port() -> int:
    """One of them."""
    return free_ports(1)[0]


def _first_ephemeral() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        return 32768
