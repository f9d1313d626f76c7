"""Quantised linear layers of other libraries: which they are, and the split form of those that have one.

They are told by class names and dtypes, without importing their packages. Two kinds are split, into layers that
multiply as the whole ones do: torchao's int8 weights with one scale a row, and diffusers' GGUF.
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multicard.errors import UnsupportedError
from multicard.layers import ColumnParallelLinear, RowParallelLinear, Shard
from multicard.layers.shard import Spans, cut, shard_of

Split = TypeVar("Split", ColumnParallelLinear, RowParallelLinear)

LAYERS = {
    "Linear8bitLt": "bitsandbytes' 8-bit",
    "Linear4bit": "bitsandbytes' 4-bit",
    "FP8Linear": "transformers' FP8",
}
"""Classes of quantised linear layers that can't be split, in words."""


def quantized(module: nn.Module) -> str | None:
    """How a layer is quantised, in words; None if its weight is plain numbers."""
    for cls in type(module).__mro__:
        if cls.__name__ in LAYERS:
            return LAYERS[cls.__name__]
        if cls.__module__.startswith("torch.ao.nn.quantized"):
            return "torch's int8"
    if hasattr(module, "qweight"):  # GPTQ, AWQ and others
        return f"{type(module).__name__} of {type(module).__module__.partition('.')[0]}"
    weight = getattr(module, "weight", None)
    return quantized_tensor(weight) if isinstance(weight, Tensor) else None


def quantized_tensor(tensor: Tensor) -> str | None:
    """The same for a parameter."""
    kind = type(tensor)
    if not issubclass(nn.Parameter, kind) and kind.__module__.partition(".")[0] != "torch":
        return f"{kind.__name__} of {kind.__module__.partition('.')[0]}"
    if tensor.is_quantized or not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        return str(tensor.dtype).removeprefix("torch.")
    return None


def has_split_form(module: nn.Module) -> bool:
    """Whether the layer is quantised in a way that can be split: :func:`fill` does it."""
    return _is_gguf(module) or _is_int8(getattr(module, "weight", None))


def check_plain(path: str, kind: str | None) -> None:
    """Refuse to split a quantised layer or parameter.

    Args:
        kind: how it is quantised, as :func:`quantized` says; None: it isn't.

    Raises:
        UnsupportedError: names it.
    """
    if kind is not None:
        raise UnsupportedError(
            f"{path} is quantised ({kind}), which tensor parallelism can't split: load the model without quantising "
            "it, or use ring, ulysses or cfg, which leave weights whole"
        )


def fill(layer: Split, whole: nn.Linear) -> Split:
    """Give a split layer this rank's part of a quantised one, and its way to multiply."""
    dim = 0 if isinstance(layer, ColumnParallelLinear) else 1
    part = _gguf if _is_gguf(whole) else _int8
    part(layer, whole, dim, layer.spans)
    if layer.bias is not None:
        layer.bias = cut(whole.bias, shard_of(layer.bias))
    return layer


def _is_int8(weight: Any) -> bool:
    """torchao's weight-only int8 with a scale for each row. If inputs are quantised too, their scale is that of whole
    inputs, of which a row-parallel layer has a part."""
    if type(weight).__name__ != "Int8Tensor" or not hasattr(weight, "act_quant_kwargs"):
        return False
    weight_only = weight.act_quant_kwargs is None and weight.act_pre_scale is None
    return weight_only and list(weight.block_size) == [1, weight.shape[1]]


def _int8(layer: ColumnParallelLinear | RowParallelLinear, whole: nn.Linear, dim: int, spans: Spans) -> None:
    weight: Any = whole.weight
    data, scale, zero = _take(weight.qdata, dim, spans), weight.scale, weight.zero_point
    if dim == 0:
        scale, zero = _take(scale, 0, spans), None if zero is None else _take(zero, 0, spans)
    made = type(weight)(data, scale, [1, data.shape[1]], weight.dtype, zero_point=zero)
    layer.weight, layer.multiply = nn.Parameter(made, requires_grad=False), _by_itself


def _by_itself(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The weight's class has its own product."""
    return F.linear(x, weight, bias)


def _is_gguf(module: nn.Module) -> bool:
    return type(module).__name__ == "GGUFLinear" and hasattr(getattr(module, "weight", None), "quant_type")


def _gguf(layer: ColumnParallelLinear | RowParallelLinear, whole: nn.Linear, dim: int, spans: Spans) -> None:
    """Rows of bytes; or of each row the blocks that have this rank's columns, which are taken out of the numbers."""
    from diffusers.quantizers.gguf.utils import GGML_QUANT_SIZES

    weight: Any = whole.weight
    dtype: Any = whole.compute_dtype
    size, width = GGML_QUANT_SIZES[weight.quant_type]  # numbers and bytes of a block
    data, columns = weight.as_tensor(), None
    if dim == 1:
        blocks = tuple(range(span.start // size, -(-span.stop // size)) for span in spans)
        columns = _columns(spans, blocks, size)
        spans = tuple(range(block.start * width, block.stop * width) for block in blocks)
    layer.weight = type(weight)(_take(data, dim, spans), quant_type=weight.quant_type)
    layer.multiply = functools.partial(_by_numbers, dtype, columns)


def _columns(spans: Spans, blocks: Spans, size: int) -> Tensor | None:
    """Where the spans' columns are among those of the blocks; None if these are all."""
    found, start = [], 0
    for span, block in zip(spans, blocks, strict=True):
        found.append(torch.arange(span.start, span.stop) - block.start * size + start)
        start += len(block) * size
    columns = torch.cat(found) if found else torch.arange(0)
    return None if len(columns) == start else columns


def _by_numbers(dtype: torch.dtype, columns: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product with the numbers that the blocks stand for, as diffusers computes it."""
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    numbers = dequantize_gguf_tensor(weight).to(dtype)
    if columns is not None:
        numbers = numbers[:, columns.to(numbers.device)]
    return F.linear(x, numbers, None if bias is None else bias.to(dtype))


def _take(whole: Tensor, dim: int, spans: Spans) -> Tensor:
    return Shard(tuple(whole.shape), dim, spans).take(whole)
