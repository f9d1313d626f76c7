"""The memory that a rank may take; larger allocations are refused before they are made."""

from __future__ import annotations

import math
import os

import psutil
import torch
import torch.distributed as dist

from multicard.errors import ConfigError

GIB = float(1 << 30)


def ranks_here() -> int:
    """How many ranks share this host's memory; all of the job's unless LOCAL_WORLD_SIZE is set."""
    everybody = dist.get_world_size() if dist.is_initialized() else 1
    return int(os.environ.get("LOCAL_WORLD_SIZE", everybody))


def free_bytes(device: torch.device, ranks: int) -> int:
    """The memory that one of ``ranks`` on this host may take: that of its card, or its part of the host's."""
    if device.type == "cpu":
        return psutil.virtual_memory().available // ranks
    free: int = getattr(torch, device.type).mem_get_info(device)[0]
    return free


def check_cache(
    layers: int, shape: tuple[int, ...], capacity: int, dtype: torch.dtype | None, device: torch.device | str | None
) -> None:
    """Refuse a cache that doesn't fit.

    Args:
        shape: of one layer's keys on this rank; its values have the same.
        capacity: tokens of each prompt with its answer, for the error.

    Raises:
        ConfigError: it doesn't fit; the message has both sizes.
    """
    needed = 2 * layers * math.prod(shape) * (dtype or torch.get_default_dtype()).itemsize
    free = free_bytes(torch.device(device or "cpu"), ranks_here())
    if needed > free:
        raise ConfigError(
            f"keys and values of {shape[0]} × {capacity} tokens take {needed / GIB:.3g} GiB, and a rank has "
            f"{free / GIB:.3g} GiB free: ask for fewer new tokens or prompts at a time, or use more tp or ring ranks"
        )
