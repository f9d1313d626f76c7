"""How ranks find each other: the job's store, and the network interface that leads to it."""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
from typing import Any

import psutil

from multicard.errors import ConfigError


def host_store(timeout: float, address: str, port: int) -> Any:
    """A store that this process serves over TCP. Its socket is bound first, to that address only.

    Raises:
        ConfigError: the address isn't this machine's, or the port is taken.
    """
    import torch.distributed as dist

    try:
        listener = socket.create_server((address, port), backlog=512)
    except OSError as error:
        raise ConfigError(
            f"can't listen on {address}:{port}: {error.strerror}; on host 0 give one of its own addresses"
        ) from None
    with listener:
        return dist.TCPStore(
            address,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=os.dup(listener.fileno()),
            timeout=datetime.timedelta(seconds=timeout),
        )


def free_port() -> int:
    """A port of this host on which nothing listens now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def interface_to(address: str) -> str:
    """The network interface that leads to ``address``: the only one that ranks need to listen on.

    Raises:
        ConfigError: there is no route to it.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting a datagram socket sends nothing
            probe.connect((address, 9))
            mine = probe.getsockname()[0]
    except OSError as error:
        raise ConfigError(
            f"no route to {address}: {error.strerror or error}; give one of host 0's own addresses"
        ) from None
    for name, addresses in psutil.net_if_addrs().items():
        if any(_same(each.address, mine) for each in addresses if each.family == socket.AF_INET):
            return name
    raise ConfigError(f"no network interface has {mine}, this machine's address towards {address}: name an interface")


def _same(one: str, other: str) -> bool:
    if ipaddress.ip_address(one).is_loopback and ipaddress.ip_address(other).is_loopback:
        return True
    return one == other
