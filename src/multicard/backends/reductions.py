"""Combining the ranks' contributions in rank order, so that the result has the same bits on every rank."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from multicard.errors import UnsupportedError

Op: Any = dist.ReduceOp.RedOpType
NAMES = {
    Op.SUM: "sum",
    Op.AVG: "avg",
    Op.PRODUCT: "product",
    Op.MIN: "min",
    Op.MAX: "max",
    Op.BAND: "band",
    Op.BOR: "bor",
    Op.BXOR: "bxor",
}
TORCH_OPS = {name: op for op, name in NAMES.items()}
COMBINE: dict[str, Callable[..., Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "product": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
    "band": torch.bitwise_and,
    "bor": torch.bitwise_or,
    "bxor": torch.bitwise_xor,
}
ROUNDING = ("sum", "avg", "product")
# torch has no arithmetic on these; modulo 2^n, signed and unsigned sums and products are the same bits
SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def op_name(op: dist.ReduceOp) -> str:
    """The reduction's name. Raises UnsupportedError for an unknown one."""
    kind: Any = op.op  # type: ignore[attr-defined]
    name = NAMES.get(kind)
    if name is None:
        raise UnsupportedError(f"reduction {kind.name} isn't supported: use one of {', '.join(TORCH_OPS)}")
    return name


@functools.cache
def check(name: str, dtype: torch.dtype) -> None:
    """Refuse combinations without a meaning or a torch kernel, on every rank and before any data moves."""
    meaningless = (
        (name == "avg" and not (dtype.is_floating_point or dtype.is_complex))
        or (name in ("min", "max") and (dtype.is_complex or dtype in SIGNED))
        or (name in ("band", "bor", "bxor") and (dtype.is_complex or dtype.is_floating_point))
    )
    try:
        if not meaningless:
            one = torch.zeros(1, dtype=torch.uint8).expand(dtype.itemsize).contiguous().view(dtype)
            reduce_into(one, [one.clone(), one.clone()], name)
    except (RuntimeError, TypeError):  # torch lacks the kernel
        meaningless = True
    if meaningless:
        raise UnsupportedError(f"backend shm can't reduce {dtype} by {name}: convert to another dtype first")


def reduce_into(out: Tensor, parts: Sequence[Tensor], name: str) -> None:
    """``out = parts[0] ∘ parts[1] ∘ ...`` from the left; ``out`` may be none of the parts but the first.

    Types of less than 32 bits are added and multiplied in float32 and rounded once.
    """
    combine, dtype = COMBINE[name], out.dtype
    if dtype in SIGNED:
        out, parts = out.view(SIGNED[dtype]), [part.view(SIGNED[dtype]) for part in parts]
    narrow = dtype.is_floating_point and dtype.itemsize < 4
    if narrow and (name in ROUNDING or dtype.itemsize < 2):
        total = parts[0].to(torch.float32)
        for part in parts[1:]:
            combine(total, part if dtype.itemsize == 2 else part.to(torch.float32), out=total)
        out.copy_(total.div_(len(parts)) if name == "avg" else total)
        return
    if len(parts) == 1:
        out.copy_(parts[0])
        return
    combine(parts[0], parts[1], out=out)
    for part in parts[2:]:
        combine(out, part, out=out)
    if name == "avg":
        out.div_(len(parts))
