"""The device that a rank computes on."""

from __future__ import annotations

import importlib.util
import os

import torch

from multicard.errors import ConfigError
from multicard.place import place

DEVICES = ("cpu", "cuda", "npu", "xpu")


def pick_device(device: str = "auto") -> torch.device:
    """The requested device, or this machine's best one. Raises ConfigError if it isn't available."""
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
        raise ConfigError(f"device={device!r}: torch {torch.__version__} has no such device on this machine; try cpu")
    return torch.device(device)


def rank_device(device: str = "auto") -> torch.device:
    """This rank's own card: the one with the number of its local rank."""
    picked = pick_device(device)
    if picked.type == "cpu" or picked.index is not None:
        return picked
    here = place()
    return torch.device(picked.type, here.local_rank if here else 0)
