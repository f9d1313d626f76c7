"""The memory that a rank may take: what doesn't fit is refused before it is made."""

from __future__ import annotations

import math
import os

import psutil
import torch
import torch.distributed as dist

from multicard.errors import ConfigError

GIB = float(1 << 30)


def ranks_here() -> int:
    """How many ranks share this host's memory; where nobody says, all of them."""
    everybody = dist.get_world_size() if dist.is_initialized() else 1
    return int(os.environ.get("LOCAL_WORLD_SIZE", everybody))


def free_bytes(device: torch.device, ranks: int) -> int:
    """Memory that one of so many ranks on this host may take: its card's, or its part of the host's."""
    if device.type == "cpu":
        return psutil.virtual_memory().available // ranks
    free: int = getattr(torch, device.type).mem_get_info(device)[0]
    return free


def check_cache(
    layers: int, shape: tuple[int, ...], capacity: int, dtype: torch.dtype | None, device: torch.device | str | None
) -> None:
    """Refuse a cache that doesn't fit.

    Args:
        shape: of one layer's keys, and of its values, on this rank.
        capacity: the tokens of each prompt and its answer that it is for.

    Raises:
        ConfigError: with both sizes.
    """
    needed = 2 * layers * math.prod(shape) * (dtype or torch.get_default_dtype()).itemsize
    free = free_bytes(torch.device(device or "cpu"), ranks_here())
    if needed > free:
        raise ConfigError(
            f"keys and values of {shape[0]} × {capacity} tokens take {needed / GIB:.3g} GiB, and a rank has "
            f"{free / GIB:.3g} GiB free: ask for fewer new tokens or prompts at a time, or use more tp or ring ranks"
        )
