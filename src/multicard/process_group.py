"""Joining a job: which backend, device and store this rank's process group uses."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os

import torch
import torch.distributed as dist

from multicard.config import ParallelConfig
from multicard.errors import ConfigError, UnsupportedError

DEVICES = ("cpu", "cuda", "npu", "xpu")
ACCELERATOR_BACKENDS = {"cuda": "nccl", "npu": "hccl", "xpu": "xccl"}


def in_job() -> bool:
    """Whether a launcher (ours, torchrun) started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def config_from_environment() -> ParallelConfig | None:
    """The degrees given to ``multicard run``, or None."""
    degrees = os.environ.get("MULTICARD_MESH")
    return ParallelConfig(**json.loads(degrees)) if degrees else None


def checking() -> bool:
    """Whether ranks compare collectives before they run: MULTICARD_CHECK=1, which ``check=True`` sets too."""
    return os.environ.get("MULTICARD_CHECK", "0") not in ("", "0")


def pick_device(device: str = "auto") -> torch.device:
    """The device asked for, or the best one here. Raises ConfigError where it isn't available."""
    if importlib.util.find_spec("torch_npu"):
        import torch_npu  # noqa: F401  registers the "npu" device
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
    return torch.device(picked.type, int(os.environ.get("LOCAL_RANK", 0)))


def pick_backend(backend: str, device: torch.device) -> str:
    """torch.distributed's backend string: what was asked for, or shm or gloo beside the card's own."""
    if checking() and device.type != "cpu":
        raise UnsupportedError(f"the check of collectives is for CPU ranks, not {device.type}: run without it")
    if backend != "auto":
        return "cpu:checked_gloo" if checking() and backend in ("gloo", "cpu:gloo") else backend
    one_host = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE")) == os.environ.get("WORLD_SIZE")
    if device.type != "cpu":
        return f"cpu:gloo,{device.type}:{ACCELERATOR_BACKENDS[device.type]}"
    has_shm = importlib.util.find_spec("multicard.backends.shm") is not None
    if one_host and has_shm:
        return "cpu:shm"
    return "cpu:checked_gloo" if checking() else "gloo"


def join(world_size: int, *, backend: str = "auto", device: str = "auto", timeout: float = 60.0) -> None:
    """Initialise torch.distributed from the environment unless it is already, and check its world size.

    Raises:
        ConfigError: the job's world size isn't ``world_size``.
    """
    actual = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    if actual != world_size:
        raise ConfigError(
            f"the mesh needs {world_size} ranks and this job has {actual}: their product must be the world size"
        )
    if dist.is_initialized():
        return
    picked = rank_device(device)
    if picked.type != "cpu":
        torch.accelerator.set_device_index(picked.index)
    name = pick_backend(backend, picked)
    if "shm" in name:
        import multicard.backends.shm
    if "checked_gloo" in name:
        import multicard.backends.check  # noqa: F401  registers itself
    dist.init_process_group(name, timeout=datetime.timedelta(seconds=timeout))
