"""What the ranks of the cfg axis tell each other once a step: that they agree, then the outputs that each computed."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from multicard import collectives
from multicard.errors import MismatchError, RankError
from multicard.mesh import Axis

SAMPLES = 48
"""Numbers in a fingerprint."""
TOLERANCE = 0.05
"""Replicas drift by rounding; other seeds and prompts differ by more than this, relative to the largest number."""


class Status(enum.IntEnum):
    OK = 0
    RAISED = 1
    CHANGED = 2
    """The output of a call has another shape than its kind had before."""


def agree(axis: Axis, device: torch.device, status: Status, facts: Sequence[float], fingerprint: Tensor) -> Tensor:
    """Everybody's status and facts, checked against each other. One all-gather of a fixed size.

    Args:
        facts: numbers that must be the same on every rank for the next exchange to be possible.
        fingerprint: ``(SAMPLES,)`` numbers out of the inputs.

    Returns:
        ``(ranks,)`` the statuses.

    Raises:
        RankError: the denoiser of another rank raised.
        MismatchError: ranks are in different steps, or their inputs differ.
    """
    head = torch.tensor([status, *facts], dtype=torch.float32, device=device)
    everybody = collectives.all_gather(torch.cat([head, fingerprint.to(device)])[None], axis).cpu()
    statuses, said = everybody[:, 0], everybody[:, 1 : 1 + len(facts)]
    if status == Status.RAISED:
        return statuses
    for rank in (statuses == Status.RAISED).nonzero().flatten().tolist():
        raise RankError(f"the denoiser raised on rank {rank} of the cfg axis", rank=rank, collective="cfg exchange")
    for rank in range(1, axis.size):
        if not torch.equal(said[rank], said[0]):
            raise MismatchError(
                f"cfg ranks 0 and {rank} are in different denoising steps: the same pipeline must run with the same "
                "arguments on every rank",
                rank=rank,
            )
    _check_inputs(everybody[:, 1 + len(facts) :])
    return statuses


def _check_inputs(samples: Tensor) -> None:
    scale = samples.abs().nan_to_num().amax().clamp(min=1e-6)
    for rank in range(1, len(samples)):
        difference = (samples[rank] - samples[0]).abs().nan_to_num(nan=0.0).amax()
        if difference > TOLERANCE * scale:
            raise MismatchError(
                f"cfg ranks 0 and {rank} called the denoiser with different inputs: give every rank the same prompt "
                "and a generator with the same seed",
                rank=rank,
            )


def fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """``(SAMPLES,)`` float32: a few numbers out of the first three floating-point tensors with rows."""
    picked = []
    for t in itertools.islice((t for t in tensors if t.is_floating_point() and t.dim() > 1 and t.numel()), 3):
        while t.dim() > 1:
            t = t.select(0, t.shape[0] // 2)
        picked.append(t[:: max(1, len(t) // 16)][:16].float())
    out = torch.cat(picked) if picked else torch.zeros(0)
    return torch.nn.functional.pad(out, (0, SAMPLES - len(out)))


def pack(leaves: Sequence[Tensor]) -> Tensor:
    """The bytes of ``leaves``, one after the other."""
    return torch.cat([leaf.detach().contiguous().reshape(-1).view(torch.uint8) for leaf in leaves])


def unpack(buffer: Tensor, templates: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of :func:`pack`: tensors of the templates' shapes, dtypes and memory layouts."""
    parts = buffer.split([size_of([t]) for t in templates])
    return [_read(part, t) for part, t in zip(parts, templates, strict=True)]


def _read(part: Tensor, template: Tensor) -> Tensor:
    plain = part.clone().view(template.dtype).view(template.shape)  # a part may start anywhere, a copy is aligned
    if template.is_contiguous():
        return plain
    return torch.empty_like(template, device=part.device).copy_(plain)  # sums depend on the order in memory


def size_of(templates: Sequence[Tensor]) -> int:
    """Bytes that :func:`pack` makes of them."""
    return sum(t.numel() * t.element_size() for t in templates)


def exchange(axis: Axis, mine: Sequence[Tensor], sizes: Sequence[int], device: torch.device) -> Sequence[Tensor]:
    """Every rank's bytes, by rank. One all-gather.

    Args:
        mine: this rank's packed outputs.
        sizes: every rank's number of bytes.
    """
    buffer = torch.cat(list(mine)) if mine else torch.empty(0, dtype=torch.uint8, device=device)
    return collectives.all_gather(buffer, axis, sizes=sizes).split(list(sizes))
