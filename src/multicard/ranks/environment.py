"""What a rank finds in its environment: its place, the store, threads; and nothing that listens outside this host."""

from __future__ import annotations

import datetime
import os
import pathlib
import socket
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multicard.ranks.children import Settings

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def host_store(timeout: float, address: str = "127.0.0.1", port: int = 0) -> tuple[Any, int]:
    """A store in this process, and its port. Its socket is bound first: to that address only, no port is guessed."""
    import torch.distributed as dist

    with socket.create_server((address, port), backlog=512) as listener:
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
    size = wanted.config.world_size
    own = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # no rank hosts the store: the parent does
        "GLOO_SOCKET_IFNAME": LOOPBACK,
        "OMP_NUM_THREADS": threads(size, wanted.threads_per_rank),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(str(pathlib.Path(p).absolute()) for p in sys.path)),
        "MULTICARD_PYTHONPATH": os.environ.get("PYTHONPATH", ""),  # what ranks hand on to their own children
        "MULTICARD_CHECK": int(wanted.check or os.environ.get("MULTICARD_CHECK", "0") not in ("", "0")),
    }
    return {**os.environ, **{name: str(value) for name, value in own.items()}, **wanted.env}


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
