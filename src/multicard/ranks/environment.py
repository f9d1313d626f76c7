"""What a rank finds in its environment: its place, the store, threads; and nothing that listens where it need not."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import pathlib
import socket
import sys
from typing import Any

import psutil

from multicard import process_group
from multicard.errors import ConfigError
from multicard.ranks.settings import Settings


def host_store(timeout: float, address: str = "127.0.0.1", port: int = 0) -> tuple[Any, int]:
    """A store in this process, and its port. Its socket is bound first: to that address only, and no port is guessed.

    Raises:
        ConfigError: the address isn't this machine's, or the port is taken.
    """
    import torch.distributed as dist

    try:
        listener = socket.create_server((address, port), backlog=512)
    except OSError as error:
        raise ConfigError(
            f"can't listen on {address}:{port}: {error.strerror}; host 0 names an address of its own"
        ) from None
    with listener:
        number = listener.getsockname()[1]
        store = dist.TCPStore(
            address,
            number,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=os.dup(listener.fileno()),
            timeout=datetime.timedelta(seconds=timeout),
        )
    return store, number


def of_rank(wanted: Settings, rank: int, port: int) -> dict[str, str]:
    """A rank's environment: this process's, and its own place in the job."""
    local = len(wanted.ranks)
    own = {
        "RANK": rank,
        "WORLD_SIZE": wanted.config.world_size,
        "LOCAL_RANK": rank - wanted.ranks.start,
        "LOCAL_WORLD_SIZE": local,
        "GROUP_RANK": wanted.hosts.index,
        "MASTER_ADDR": wanted.hosts.address,
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # no rank hosts the store: a parent does
        "GLOO_SOCKET_IFNAME": wanted.hosts.interface or interface_to(wanted.hosts.address),
        "OMP_NUM_THREADS": threads(local, wanted.threads_per_rank),
        "PYTHONPATH": os.pathsep.join(_search_path()),
        "MULTICARD_PYTHONPATH": os.environ.get("PYTHONPATH", ""),  # what ranks hand on to their own children
        "MULTICARD_CHECK": int(wanted.check or os.environ.get("MULTICARD_CHECK", "0") not in ("", "0")),
        "MULTICARD_COMPARE_INPUTS": int(wanted.compare_inputs and process_group.comparing()),
        "MULTICARD_MESH": json.dumps(wanted.config.degrees),
        "MULTICARD_BACKEND": wanted.backend,
        "MULTICARD_DEVICE": wanted.device,
        "MULTICARD_TIMEOUT": wanted.timeout,
    }
    defaults = {
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # its warnings are about host names that nothing here needs
        "THP_MEM_ALLOC_ENABLE": "1",  # tensors in huge pages: weights are read up to 7% faster
    }
    return {**defaults, **os.environ, **{name: str(value) for name, value in own.items()}, **wanted.env}


def _search_path() -> list[str]:
    """Where this process finds modules, so that its ranks find the same; relative folders of a folder that was deleted
    hold none."""
    try:
        here = pathlib.Path.cwd()
    except FileNotFoundError:
        return [path for path in dict.fromkeys(sys.path) if os.path.isabs(path)]
    return list(dict.fromkeys(str(here / path) for path in sys.path))


def interface_to(address: str) -> str:
    """The network interface on the way to ``address``: the only one that ranks need to listen on.

    Raises:
        ConfigError: there is no way to it.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting a datagram socket sends nothing
            probe.connect((address, 9))
            mine = probe.getsockname()[0]
    except OSError as error:
        raise ConfigError(
            f"no way to {address}: {error.strerror or error}; name host 0 by an address of its own"
        ) from None
    for name, addresses in psutil.net_if_addrs().items():
        if any(_same(each.address, mine) for each in addresses if each.family == socket.AF_INET):
            return name
    raise ConfigError(f"no network interface has {mine}, this machine's address towards {address}: name one")


def _same(one: str, other: str) -> bool:
    if ipaddress.ip_address(one).is_loopback and ipaddress.ip_address(other).is_loopback:
        return True
    return one == other


def threads(ranks: int, asked: int | None = None) -> int:
    """Threads for each of ``ranks`` on this host: what was asked for, OMP_NUM_THREADS, or cores ÷ ranks."""
    if asked is not None:
        return asked
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdigit() and int(said) > 0 else max(1, cores() // ranks)


def cores() -> int:
    """Cores that this process may use: its affinity, within its container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = pathlib.Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(allowed, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2 here, or "max": no quota
        return allowed
