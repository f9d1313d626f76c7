"""For inference: inputs that require gradients are computed without recording any, and a backward raises an error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from multicard.errors import UnsupportedError

P = ParamSpec("P")
R = TypeVar("R")


class _NoBackward(torch.autograd.Function):
    """The identity, recorded with an input, so that a backward raises here instead of silently ending early."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, tied_to: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise UnsupportedError(
            "multicard's attention has no backward: run it in torch.no_grad(), or on frozen parameters"
        )


def inference_only(call: Callable[P, R]) -> Callable[P, R]:
    """``call(q, k, v, ...)`` without recording gradients; if q, k or v requires them, a backward raises."""

    @functools.wraps(call)
    def inference(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_grad_enabled():
            return call(*args, **kwargs)
        with torch.no_grad():
            result = call(*args, **kwargs)
        asks = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
        if not asks:
            return result
        parts = result if isinstance(result, tuple) else (result,)
        tied = tuple(_NoBackward.apply(x, asks[0]) for x in parts)
        return tied if isinstance(result, tuple) else tied[0]  # type: ignore[return-value]

    return inference
