"""What the ranks of the cfg axis exchange once a step: first their status, then the outputs that each computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from multicard import collectives
from multicard.axis import Axis
from multicard.digest import describe
from multicard.errors import MismatchError
from multicard.replica import Status, say


class Agreed(NamedTuple):
    """The ranks' statuses combined: on some rank an output has ``changed`` its shape, or was read ``early``."""

    changed: bool
    early: bool


def agree(axis: Axis, device: torch.device, status: Status, facts: Sequence[int], early: bool = False) -> Agreed:
    """All ranks' statuses, after a check that all are in the same step. One small all-reduce.

    Args:
        facts: numbers that must be the same on every rank for the next exchange.
        early: this rank has read an output before the exchange.

    Raises:
        RankError: the denoiser of another rank raised.
        MismatchError: ranks are in different steps.
    """
    point = describe(facts).hash_here("cfg exchange")
    everybody = say(axis, device, status, point, torch.tensor(int(early)))
    for rank, (said, there, _) in enumerate(everybody):
        if Status.RAISED not in (status, said) and there != point:
            raise MismatchError(
                f"cfg ranks {axis.rank} and {rank} are in different denoising steps: the same pipeline must run with "
                "the same arguments on every rank",
                rank=rank,
            )
    return Agreed(any(said == Status.CHANGED for said, *_ in everybody), any(words[2] for words in everybody))


def total(axis: Axis, device: torch.device, numbers: tuple[float, float]) -> tuple[float, float]:
    """Two numbers, in float32, summed over ranks. One all-reduce, of the size of :func:`agree`'s.

    Raises:
        RankError: the denoiser of another rank raised.
    """
    first, second = torch.tensor(numbers).view(torch.int32)
    everybody = torch.tensor(say(axis, device, Status.OK, int(first), second))[:, 1:]
    sums = everybody.to(torch.int32).view(torch.float32).double().sum(0)
    return sums[0].item(), sums[1].item()


def pack(leaves: Sequence[Tensor]) -> Tensor:
    """The bytes of ``leaves``, concatenated."""
    return torch.cat([leaf.detach().contiguous().reshape(-1).view(torch.uint8) for leaf in leaves])


def unpack(buffer: Tensor, templates: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of :func:`pack`: tensors of the templates' shapes, dtypes and memory layouts."""
    parts = buffer.split([size_of([t]) for t in templates])
    return [_read(part, t) for part, t in zip(parts, templates, strict=True)]


def _read(part: Tensor, template: Tensor) -> Tensor:
    plain = part.clone().view(template.dtype).view(template.shape)  # a part may start at any byte; a copy is aligned
    if template.is_contiguous():
        return plain
    return torch.empty_like(template, device=part.device).copy_(plain)  # rounding depends on the order in memory


def size_of(templates: Sequence[Tensor]) -> int:
    """The number of bytes that :func:`pack` gives for them."""
    return sum(t.numel() * t.element_size() for t in templates)


def exchange(axis: Axis, mine: Sequence[Tensor], sizes: Sequence[int], device: torch.device) -> Sequence[Tensor]:
    """Every rank's bytes, by rank. One all-gather.

    Args:
        mine: this rank's packed outputs.
        sizes: every rank's number of bytes.
    """
    buffer = torch.cat(list(mine)) if mine else torch.empty(0, dtype=torch.uint8, device=device)
    return collectives.all_gather(buffer, axis, sizes=sizes).split(list(sizes))
