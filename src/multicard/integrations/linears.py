"""Which modules of any library are linear layers, and their column- and row-parallel forms."""

from __future__ import annotations

import dataclasses

from torch import nn

from multicard.axis import Axis
from multicard.errors import UnsupportedError
from multicard.integrations.adapters import base_of, check_adapter, is_adapter
from multicard.integrations.quantized import check_plain, fill, has_split_form, quantized
from multicard.layers import ColumnParallelLinear, RowParallelLinear
from multicard.layers.shard import Shares, shard_of, sharded

SAME_PRODUCT = ("FalconLinear",)
"""Subclasses of ``nn.Linear`` with a forward of their own that multiplies as ``nn.Linear`` does."""


def check_linear(module: nn.Module, path: str) -> tuple[int, int]:
    """``(in_features, out_features)`` of ``module`` at ``path``.

    Raises:
        UnsupportedError: it doesn't multiply like a plain linear layer, with or without LoRA adapters.
    """
    if is_adapter(module):
        check_adapter(module, path)
        module = base_of(module)
    if isinstance(module, nn.Linear) and has_split_form(module):
        return module.in_features, module.out_features
    check_plain(path, quantized(module))
    if _is_conv1d(module):
        features_in, features_out = module.get_parameter("weight").shape
        return features_in, features_out
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    if isinstance(module, nn.Linear) and (plain or type(module).__name__ in SAME_PRODUCT):
        return module.in_features, module.out_features
    raise UnsupportedError(
        f"{path} is a {type(module).__name__}, not a plain linear layer, so tensor parallelism can't split it: "
        "leave it out with plan="
    )


def features(module: nn.Module) -> tuple[int, int]:
    """The same for any module: zeros if it isn't a linear layer."""
    module = base_of(module)
    if _is_conv1d(module):
        return check_linear(module, "")
    return getattr(module, "in_features", 0), getattr(module, "out_features", 0)


def column_parallel(
    module: nn.Module, axis: Axis, path: str, shares: Shares | None = None, gather_output: bool = False
) -> ColumnParallelLinear:
    """``module`` split by output features, by ``shares`` (None: evenly)."""
    linear = _as_linear(module, path)
    if has_split_form(linear):
        sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
        return fill(ColumnParallelLinear(*sizes, axis, bias, gather_output, device="meta", shares=shares), linear)
    layer = ColumnParallelLinear.from_linear(linear, axis, gather_output, shares)
    _mark_transposed(layer, module)
    return layer


def row_parallel(module: nn.Module, axis: Axis, path: str, shares: Shares | None = None) -> RowParallelLinear:
    """``module`` split by input features, by ``shares`` (None: evenly)."""
    linear = _as_linear(module, path)
    if has_split_form(linear):
        sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
        return fill(RowParallelLinear(*sizes, axis, bias, device="meta", shares=shares), linear)
    layer = RowParallelLinear.from_linear(linear, axis, shares=shares)
    _mark_transposed(layer, module)
    return layer


def _as_linear(module: nn.Module, path: str) -> nn.Linear:
    features_in, features_out = check_linear(module, path)
    if isinstance(module, nn.Linear):
        return module
    linear = nn.Linear(features_in, features_out, bias=False, device="meta")
    weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
    linear.weight, linear.bias = nn.Parameter(weight.detach().T, requires_grad=False), bias
    return linear


def _mark_transposed(layer: ColumnParallelLinear | RowParallelLinear, origin: nn.Module) -> None:
    if _is_conv1d(origin):
        shard = dataclasses.replace(shard_of(layer.weight), transposed=True)
        layer.weight = sharded(layer.weight.detach(), shard)


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is ``(in_features, out_features)``."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
