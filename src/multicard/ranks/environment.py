"""A rank's environment variables: its place in the job, its threads, its module path."""

from __future__ import annotations

import json
import os
import pathlib
import sys

from multicard.place import checking, comparing
from multicard.ranks.settings import Settings
from multicard.rendezvous import interface_to

CHANGING = ("PYTEST_CURRENT_TEST",)
"""Variables that change often, and that no module reads while it is imported."""


def of_rank(wanted: Settings, rank: int, port: int) -> dict[str, str]:
    """A rank's environment: this process's, with the rank's place in the job."""
    return {**shared(wanted), **_place(wanted, rank, port), **(wanted.env or {})}


def shared(wanted: Settings) -> dict[str, str]:
    """The part that all ranks of such jobs have in common: everything that may be read when torch is imported."""
    defaults = {
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # its warnings are about host names, which aren't used here
        "THP_MEM_ALLOC_ENABLE": "1",  # tensors in huge pages: weights are read up to 7% faster
    }
    own = {
        "OMP_NUM_THREADS": str(threads(len(wanted.ranks), wanted.threads_per_rank)),
        "PYTHONPATH": os.pathsep.join(_search_path()),
        "MULTICARD_PYTHONPATH": os.environ.get("PYTHONPATH", ""),  # for the ranks' own children
    }
    place = _place(wanted, 0, 0)
    everything = {**defaults, **os.environ, **own, **(wanted.env or {})}
    return {name: value for name, value in everything.items() if name not in place}


def _place(wanted: Settings, rank: int, port: int) -> dict[str, str]:
    """The part that differs between ranks and jobs; it is read when a rank joins, or later."""
    place = {
        "RANK": rank,
        "WORLD_SIZE": wanted.config.world_size,
        "LOCAL_RANK": rank - wanted.ranks.start,
        "LOCAL_WORLD_SIZE": len(wanted.ranks),
        "GROUP_RANK": wanted.hosts.index,
        "MASTER_ADDR": wanted.hosts.address,
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": wanted.hosts.count > 1,  # no rank hosts the store: a parent does
        "GLOO_SOCKET_IFNAME": wanted.hosts.interface or interface_to(wanted.hosts.address),
        "MULTICARD_CHECK": int(wanted.check or checking()),
        "MULTICARD_COMPARE_INPUTS": int(wanted.compare_inputs and comparing()),
        "MULTICARD_MESH": json.dumps(wanted.config.degrees),
        "MULTICARD_BACKEND": wanted.backend,
        "MULTICARD_DEVICE": wanted.device,
        "MULTICARD_TIMEOUT": wanted.timeout,
    }
    changing = {name: os.environ[name] for name in CHANGING if name in os.environ}
    return {**changing, **{name: str(value) for name, value in place.items()}}


def _search_path() -> list[str]:
    """The folders in which this process finds modules, for its ranks; without relative ones if the working folder was
    deleted."""
    try:
        here = pathlib.Path.cwd()
    except FileNotFoundError:
        return [path for path in dict.fromkeys(sys.path) if os.path.isabs(path)]
    return list(dict.fromkeys(str(here / path) for path in sys.path))


def threads(ranks: int, asked: int | None = None) -> int:
    """Threads for each of ``ranks`` on this host: the requested number, OMP_NUM_THREADS, or cores ÷ ranks."""
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
