"""The interface of an attention kernel: one signature, and a function that says what it doesn't support."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

MASKED = -1.7e38
"""Added to a dropped score. Finite, so that a kernel's result for a row without any other score is finite too: its LSE
is near this number instead of undefined, and :data:`DEAD` detects it."""

DEAD = -1e37
"""A row whose LSE is below this has no key to attend to."""


@dataclasses.dataclass(frozen=True)
class Request:
    """The properties of a kernel call that decide whether a kernel supports it.

    Attributes:
        device: "cpu", "cuda", "npu".
        dtype: of queries, keys and values.
        query_rows, key_rows: lengths, both above zero.
        heads, kv_heads: the first a multiple of the second.
        head_dim, value_dim: of queries and keys; of values.
        causal: row i sees keys 0 to i; only with as many rows as keys.
        masked: a mask is given.
    """

    device: str
    dtype: torch.dtype
    query_rows: int
    key_rows: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    causal: bool
    masked: bool


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a kernel supports.

    Attributes:
        device, dtypes: where it runs, and on what.
        masks: it takes a mask.
        causal_masks: also where it is causal.
        single_rows: it takes one query or one key.
        multiple, largest: head_dim, which is one for queries, keys and values.
    """

    device: str
    dtypes: tuple[torch.dtype, ...]
    masks: bool = True
    causal_masks: bool = False
    single_rows: bool = True
    multiple: int = 1
    largest: float = math.inf

    def refuse(self, request: Request) -> str | None:
        """What of ``request`` is outside, or None."""
        width = request.head_dim
        if request.device != self.device:
            return f"is for {self.device}, not {request.device}"
        if request.dtype not in self.dtypes:
            return f"has {', '.join(map(str, self.dtypes))}, not {request.dtype}"
        if request.masked and not self.masks:
            return "takes no mask"
        if request.masked and request.causal and not self.causal_masks:
            return "takes a mask or causality, not both"
        if not self.single_rows and 1 in (request.query_rows, request.key_rows):
            return "needs more than one row"
        if width != request.value_dim or width % self.multiple or width > self.largest:
            fits = f"needs one head_dim in multiples of {self.multiple} up to {self.largest}"
            return f"{fits}, not {width} and {request.value_dim}"
        return None


KernelFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float], tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One implementation of attention over one block of keys.

    Attributes:
        name: for tables and tests.
        run: ``run(q, k, v, mask, causal, scale) -> (out, lse)``. ``q`` is ``(B, Sq, H, D)``, ``k`` ``(B, Sk, Hkv, D)``,
            ``v`` ``(B, Sk, Hkv, Dv)``, ``mask`` ``(B|1, H|1, Sq|1, Sk)``, bool (True = keep) or added to the scores.
            ``out`` is ``(B, Sq, H, Dv)`` in the inputs' dtype or float32, ``lse`` ``(B, Sq, H)`` float32, the natural
            logarithm of the sum of exponentials, below :data:`DEAD` in rows with nothing to attend to.
        limits: what it is never called beyond; None: there are none.
    """

    name: str
    run: KernelFunction
    limits: Limits | None = None

    def refuses(self, request: Request) -> str | None:
        """Why it can't, or None."""
        return None if self.limits is None else self.limits.refuse(request)


def additive(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A mask as numbers to add to the scores: 0 where bool keeps, the lowest allowed finite number where it drops."""
    lowest = max(MASKED, torch.finfo(dtype).min)
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)
    return mask.to(dtype).clamp(min=lowest)  # in this order: float16 can't be clamped at a number outside its range


def repeat_kv(x: Tensor, heads: int) -> Tensor:
    """``(B, S, Hkv, D)`` with every key/value head repeated for the query heads that read it: ``(B, S, H, D)``."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)
