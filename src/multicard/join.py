"""Joining a job: which backend this rank's process group uses, and where its store is."""

from __future__ import annotations

import datetime
import importlib
import os
import re
import socket
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist

from multicard.device import DEVICES, rank_device
from multicard.errors import ConfigError, UnsupportedError
from multicard.place import Place, checking, place
from multicard.rendezvous import host_store, interface_to

DEFAULT_TIMEOUT = 60.0  # seconds; `multicard run --timeout` replaces it unless a script asks for another
ACCELERATOR_BACKENDS = {"cuda": "nccl", "npu": "hccl", "xpu": "xccl"}


def pick_backend(backend: str, device: torch.device, one_host: bool = True) -> str:
    """torch.distributed's backend string: the requested one, or shm or gloo, together with the card's own backend."""
    if backend == "auto":
        backend = os.environ.get("MULTICARD_BACKEND", "auto")
    if device.type != "cpu":
        if checking():
            raise UnsupportedError(f"the check of collectives is for CPU ranks, not {device.type}: run without it")
        return backend if backend != "auto" else f"cpu:gloo,{device.type}:{ACCELERATOR_BACKENDS[device.type]}"
    if backend == "auto":
        backend = "shm" if one_host and sys.platform == "linux" else "gloo"
    known = {"shm": "cpu:shm", "gloo": "cpu:checked_gloo" if checking() else "gloo"}
    return known.get(backend.removeprefix("cpu:"), backend)


def pick_timeout(timeout: float) -> float:
    """The requested timeout; if that is the default, the one given to ``multicard run --timeout``."""
    return timeout if timeout != DEFAULT_TIMEOUT else float(os.environ.get("MULTICARD_TIMEOUT", timeout))


def limit_waits(group: dist.ProcessGroup, timeout: float) -> None:
    """Let no collective of the group wait longer than ``timeout`` seconds."""
    limit = datetime.timedelta(seconds=timeout)
    if type(group) is dist.ProcessGroup:
        dist.distributed_c10d._set_pg_timeout(limit, group)
    else:
        group.set_timeout(limit)


def join(world_size: int, *, backend: str = "auto", device: str = "auto", timeout: float = DEFAULT_TIMEOUT) -> None:
    """Initialise torch.distributed from the environment unless it is already, and check its world size.

    Raises:
        ConfigError: the job's world size isn't ``world_size``, or this torch doesn't have the backend.
    """
    here = place()
    actual = dist.get_world_size() if dist.is_initialized() else here.world_size if here else 1
    if actual != world_size:
        raise ConfigError(
            f"the mesh needs {world_size} ranks and this job has {actual}: the degrees' product must be the world size"
        )
    if dist.is_initialized():
        return
    assert here is not None, "callers join a job only where there is one"
    picked = rank_device(device)
    if picked.type != "cpu":
        torch.accelerator.set_device_index(picked.index)
    name = pick_backend(backend, picked, here.one_host)
    _register(name)
    _confine(here)
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group(name, store=_store(here), rank=here.rank, world_size=here.world_size, timeout=limit)


def _register(name: str) -> None:
    """Import the module that registers the backend, if it is one of ours."""
    if "shm" in name:
        import multicard.backends.shm
    if "checked_gloo" in name:
        import multicard.backends.check  # noqa: F401
    unknown = [part for part in re.split(r"[:,]", name) if part not in (*dist.Backend.backend_list, *DEVICES)]
    if unknown:
        raise ConfigError(
            f"backend={name!r}: this torch has {', '.join(dist.Backend.backend_list)}; ours are shm, gloo"
        )


def _confine(here: Place) -> None:
    """Make gloo listen only on the interface that leads to the store (loopback on one host), unless one is set."""
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = interface_to("127.0.0.1" if here.one_host else here.address)


def serve_scripts() -> None:
    """Let ``init_process_group`` in a script (``env://``, its default) use the job's store as we do."""

    def rendezvous(url: str, timeout: datetime.timedelta, **kwargs: object) -> Iterator[tuple[dist.Store, int, int]]:
        here = place()
        assert here is not None, "a script is run by a rank"
        yield _store(here), here.rank, here.world_size
        raise RuntimeError("ranks can't be changed once a process group has been made")

    importlib.import_module("torch.distributed.rendezvous")._rendezvous_handlers["env"] = rendezvous


def _store(here: Place) -> dist.Store:
    """The job's store: a file that only its ranks have, or else a server; where no launcher hosts that, rank 0 does,
    bound to the job's address and nothing else.
    """
    prefix = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if here.store is not None:
        path = f"/proc/self/fd/{here.store}"
        if not os.path.exists(path):
            raise ConfigError(
                "this process has a rank's environment (RANK, MULTICARD_STORE) but isn't one: a rank's own child "
                "processes have to be started without those variables"
            )
        return dist.PrefixStore(prefix, dist.FileStore(path))
    if here.hosts_store and here.rank == 0:
        return dist.PrefixStore(prefix, host_store(300, socket.gethostbyname(here.address), here.port))
    limit = datetime.timedelta(seconds=300)
    return dist.PrefixStore(prefix, dist.TCPStore(here.address, here.port, is_master=False, timeout=limit))
