"""Collectives on a process group, at once.

Shared-memory groups are called directly, which halves the time of a decode step's small messages and needs no padding
for uneven sizes. Other groups go through torch.distributed's in-place calls: its functional ones cost ten times as much
each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
HALF = (torch.float16, torch.bfloat16)

# its name since torch 2.13, and the older one
_all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def all_reduce(x: Tensor, group: dist.ProcessGroup, op: str) -> Tensor:
    """All ranks' ``x`` combined; it may be ``x`` itself, overwritten."""
    shm = getattr(group, "shm", None)
    if shm is not None:
        x = x.contiguous()
        shm.all_reduce(x, op)
        return x
    # gloo on the CPU would round half types after every addition
    narrow = op == "sum" and x.dtype in HALF and x.device.type == "cpu" and "gloo" in dist.get_backend(group)
    wide = (x.float() if narrow else x).contiguous()
    dist.all_reduce(wide, REDUCE_OPS[op], group=group)
    return wide.to(x.dtype)


def all_gather(x: Tensor, group: dist.ProcessGroup, counts: Sequence[int]) -> Tensor:
    """Every rank's elements, ``counts`` of them by rank, in rank order; ``x`` is 1-D and contiguous."""
    shm = getattr(group, "shm", None)
    if shm is not None:
        out = x.new_empty(sum(counts))
        if min(counts) == max(counts):
            shm.all_gather_single(out, x)
        else:
            shm.all_gather(out.split_with_sizes(list(counts)), x)
        return out
    longest, ranks = max(counts), len(counts)
    if x.numel() < longest:  # other backends gather one size, and sizes differ by one row at most
        x = torch.cat([x, x.new_zeros(longest - x.numel())])
    out = x.new_empty(ranks * longest)
    if longest:
        _all_gather_single(out, x, group=group)
    if min(counts) == longest:
        return out
    return torch.cat([part[:count] for part, count in zip(out.view(ranks, -1), counts, strict=True)])


def all_to_all(x: Tensor, group: dist.ProcessGroup, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """``send`` rows of ``x`` to each rank; ``receive`` rows from each, in rank order."""
    out = x.new_empty(sum(receive), *x.shape[1:])
    shm = getattr(group, "shm", None)
    if shm is not None:
        shm.all_to_all_single(out, x, receive, send).wait()
    else:
        dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), group=group)
    return out


def broadcast(x: Tensor, group: dist.ProcessGroup, source: int) -> Tensor:
    """The ``x`` of rank ``source`` in every rank's ``x``, which is returned."""
    x = x.contiguous()
    shm = getattr(group, "shm", None)
    if shm is not None:
        shm.broadcast(x, source)
    else:
        dist.broadcast(x, group=group, group_src=source)
    return x
