"""Joining a job: which backend, device and store this rank's process group uses."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import json
import os
import re
import socket

import torch
import torch.distributed as dist

from multicard.config import ParallelConfig
from multicard.errors import ConfigError, UnsupportedError

DEVICES = ("cpu", "cuda", "npu", "xpu")
DEFAULT_TIMEOUT = 60.0  # seconds; where a script doesn't ask for another, `multicard run --timeout` says
ACCELERATOR_BACKENDS = {"cuda": "nccl", "npu": "hccl", "xpu": "xccl"}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a launcher put this process.

    Attributes:
        rank, world_size: among all ranks.
        local_rank, local_world_size: among this host's.
        address, port: of the job's store.
        hosts_store: rank 0 has to host the store: no launcher does.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int
    hosts_store: bool

    @property
    def one_host(self) -> bool:
        return self.local_world_size == self.world_size


def place() -> Place | None:
    """This process's place in a job, from the environment of ``multicard run``, torchrun or srun; None outside any."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _torch_place()
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:  # srun, not its shell
        return _slurm_place()
    return None


def _torch_place() -> Place:
    size = int(os.environ["WORLD_SIZE"])
    return Place(
        rank=int(os.environ["RANK"]),
        world_size=size,
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", size)),
        address=os.environ.get("MASTER_ADDR", "127.0.0.1"),
        port=int(os.environ.get("MASTER_PORT", 29500)),
        hosts_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
    )


def slurm_store() -> tuple[str, int]:
    """Where a SLURM job's store is unless MASTER_ADDR and MASTER_PORT say: its first node, a port by its number."""
    first = re.match(r"[^,\[]+(\[\d+)?", os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    address = first.group().replace("[", "") if first else "127.0.0.1"
    port = 20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 10000
    return os.environ.get("MASTER_ADDR", address), int(os.environ.get("MASTER_PORT", port))


def _slurm_place() -> Place:
    address, port = slurm_store()
    tasks = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ["SLURM_STEP_NUM_TASKS"]))
    return Place(
        rank=int(os.environ["SLURM_PROCID"]),
        world_size=int(os.environ["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(os.environ["SLURM_LOCALID"]),
        local_world_size=int(tasks.group()) if tasks else 1,
        address=address,
        port=port,
        hosts_store=True,
    )


def in_job() -> bool:
    """Whether a launcher (ours, torchrun, srun) started this process as a rank."""
    return place() is not None


def is_first() -> bool:
    """Whether this process is the one that speaks: a job's rank 0, or no rank at all."""
    here = place()
    return here is None or here.rank == 0


def config_from_environment() -> ParallelConfig | None:
    """The degrees given to ``multicard run``, or None."""
    degrees = os.environ.get("MULTICARD_MESH")
    return ParallelConfig(**json.loads(degrees)) if degrees else None


def checking() -> bool:
    """Whether ranks compare collectives before they run: MULTICARD_CHECK=1, which ``check=True`` sets too."""
    return os.environ.get("MULTICARD_CHECK", "0") not in ("", "0")


def comparing() -> bool:
    """Whether ranks compare what they are given: unless MULTICARD_COMPARE_INPUTS=0."""
    return os.environ.get("MULTICARD_COMPARE_INPUTS", "1") not in ("", "0")


def pick_device(device: str = "auto") -> torch.device:
    """The device asked for, or the best one here. Raises ConfigError where it isn't available."""
    if importlib.util.find_spec("torch_npu"):
        import torch_npu  # noqa: F401  registers the "npu" device
    if device == "auto":
        device = os.environ.get("MULTICARD_DEVICE", "auto")
    if device == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return torch.device(found.type if found and found.type in DEVICES else "cpu")
    kind = device.split(":")[0]
    if kind not in DEVICES:
        raise ConfigError(f"device={device!r}: must be auto, {', '.join(DEVICES)}")
    if kind != "cpu" and not (hasattr(torch, kind) and getattr(torch, kind).is_available()):
        raise ConfigError(f"device={device!r}: this machine has none that torch {torch.__version__} can use; try cpu")
    return torch.device(device)


def rank_device(device: str = "auto") -> torch.device:
    """This rank's own card: its local rank's, counted from 0."""
    picked = pick_device(device)
    if picked.type == "cpu" or picked.index is not None:
        return picked
    here = place()
    return torch.device(picked.type, here.local_rank if here else 0)


def pick_backend(backend: str, device: torch.device, one_host: bool = True) -> str:
    """torch.distributed's backend string: what was asked for, or shm or gloo beside the card's own."""
    if backend == "auto":
        backend = os.environ.get("MULTICARD_BACKEND", "auto")
    if device.type != "cpu":
        if checking():
            raise UnsupportedError(f"the check of collectives is for CPU ranks, not {device.type}: run without it")
        return backend if backend != "auto" else f"cpu:gloo,{device.type}:{ACCELERATOR_BACKENDS[device.type]}"
    if backend == "auto":
        backend = "shm" if one_host and hasattr(os, "memfd_create") else "gloo"  # Linux has it
    known = {"shm": "cpu:shm", "gloo": "cpu:checked_gloo" if checking() else "gloo"}
    return known.get(backend.removeprefix("cpu:"), backend)


def pick_timeout(timeout: float) -> float:
    """What was asked for; where that is the default, what ``multicard run --timeout`` said."""
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
            f"the mesh needs {world_size} ranks and this job has {actual}: their product must be the world size"
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
    """Import what registers the backend, if it is ours."""
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
    """Have gloo listen only on the interface that leads to the store, loopback on one host, unless told otherwise."""
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        from multicard.ranks.environment import interface_to

        os.environ["GLOO_SOCKET_IFNAME"] = interface_to("127.0.0.1" if here.one_host else here.address)


def _store(here: Place) -> dist.Store:
    """The job's store; where no launcher hosts it rank 0 does, bound to the job's address and nothing else."""
    from multicard.ranks.environment import host_store

    prefix = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if here.hosts_store and here.rank == 0:
        return dist.PrefixStore(prefix, host_store(300, socket.gethostbyname(here.address), here.port)[0])
    limit = datetime.timedelta(seconds=300)
    return dist.PrefixStore(prefix, dist.TCPStore(here.address, here.port, is_master=False, timeout=limit))
