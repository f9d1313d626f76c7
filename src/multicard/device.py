"""The device that a rank computes on."""

from __future__ import annotations

import importlib.util
import os

import torch

from multicard.errors import ConfigError
from multicard.place import place

DEVICES = ("cpu", "cuda", "npu", "xpu")


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
