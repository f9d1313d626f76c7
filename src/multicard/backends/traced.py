"""The collectives of :mod:`multicard.backends.eager` as operators of torch, which ``torch.compile`` keeps in its graph.

Each returns a new tensor, whose shape follows from its arguments, so no size needs to be known while compiling. Groups
are passed by name, as torch's own functional collectives do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from multicard.backends import eager


def group_of(name: str) -> dist.ProcessGroup:
    """The process group of that name in this job."""
    group: dist.ProcessGroup = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    return group


@torch.library.custom_op("multicard::all_reduce", mutates_args=(), schema="(Tensor x, str group, str op) -> Tensor")
def all_reduce(x: Tensor, group: str, op: str) -> Tensor:
    return eager.all_reduce(x.clone(memory_format=torch.contiguous_format), group_of(group), op)


@torch.library.custom_op(
    "multicard::all_gather", mutates_args=(), schema="(Tensor x, str group, SymInt[] counts) -> Tensor"
)
def all_gather(x: Tensor, group: str, counts: Sequence[int]) -> Tensor:
    return eager.all_gather(x.contiguous(), group_of(group), counts)


@torch.library.custom_op(
    "multicard::all_to_all",
    mutates_args=(),
    schema="(Tensor x, str group, SymInt[] send, SymInt[] receive) -> Tensor",
)
def all_to_all(x: Tensor, group: str, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    return eager.all_to_all(x, group_of(group), send, receive)


@torch.library.custom_op("multicard::broadcast", mutates_args=(), schema="(Tensor x, str group, int source) -> Tensor")
def broadcast(x: Tensor, group: str, source: int) -> Tensor:
    return eager.broadcast(x.clone(memory_format=torch.contiguous_format), group_of(group), source)


@all_reduce.register_fake
def _(x: Tensor, group: str, op: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@all_gather.register_fake
def _(x: Tensor, group: str, counts: Sequence[int]) -> Tensor:
    return x.new_empty(sum(counts))


@all_to_all.register_fake
def _(x: Tensor, group: str, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    return x.new_empty(sum(receive), *x.shape[1:])


@broadcast.register_fake
def _(x: Tensor, group: str, source: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
