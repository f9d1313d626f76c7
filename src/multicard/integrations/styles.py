"""What each style of a plan does to a module of a ``transformers`` model: the only code that replaces modules.

Every parameter that results carries its shard rule, so the same conversion serves a model in memory and one on the meta
device that is read from files afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from multicard import collectives, partition
from multicard.axis import Axis
from multicard.errors import UnsupportedError
from multicard.integrations.heads import Heads
from multicard.integrations.seams import Hooks
from multicard.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    Shard,
    VocabParallelEmbedding,
    even_shares,
)
from multicard.layers.packed import pack
from multicard.layers.shard import Shares, sharded

Layer = TypeVar("Layer", bound=nn.Module)

GROUPED_MM_BYTES = 16
"""torch's grouped matrix product needs rows of a multiple of this many bytes, so experts are split in such units."""


def as_linear(module: nn.Module, path: str) -> nn.Linear:
    """The module as a linear layer; GPT-2's ``Conv1D`` is one with its weight transposed."""
    if isinstance(module, nn.Linear):
        return module
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        linear = nn.Linear(1, 1, bias=False, device="meta")
        weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
        linear.weight, linear.bias = nn.Parameter(weight.detach().T, requires_grad=False), bias
        linear.out_features, linear.in_features = linear.weight.shape
        return linear
    raise UnsupportedError(f"{path} is a {type(module).__name__}, not a linear layer: it can't be split; pass plan=")


def column(module: nn.Module, axis: Axis, shares: Shares | None, path: str) -> ColumnParallelLinear:
    """Output features by ``shares`` (None: evenly)."""
    return _mark(ColumnParallelLinear.from_linear(as_linear(module, path), axis, shares=shares), module)


def gate_up(module: nn.Module, axis: Axis, path: str) -> ColumnParallelLinear:
    """Both halves of [gate | up] evenly."""
    linear = as_linear(module, path)
    width = linear.out_features // 2
    shares = tuple(
        (*spans, *(range(s.start + width, s.stop + width) for s in spans)) for spans in even_shares(width, axis.size)
    )
    return _mark(ColumnParallelLinear.from_linear(linear, axis, shares=shares), module)


def row(module: nn.Module, axis: Axis, shares: Shares | None, path: str, idle_width: int = 0) -> RowParallelLinear:
    """Input features by ``shares``; a rank that computes for nothing takes ``idle_width`` features times zero."""
    layer = _mark(RowParallelLinear.from_linear(as_linear(module, path), axis, shares=shares), module)
    if idle_width:
        layer.weight = _zeros(layer.weight, (layer.out_features, idle_width))
    return layer


def _mark(layer: Layer, origin: nn.Module) -> Layer:
    for parameter in layer.parameters():
        # The file holds Conv1D's weight the other way round.
        parameter.transposed = type(origin).__name__ == "Conv1D" and parameter.dim() == 2  # type: ignore[attr-defined]
    return layer


def _zeros(like: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    """A parameter of zeros that no file holds."""
    zeros = nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device), requires_grad=False)
    zeros.filled = 0.0  # type: ignore[attr-defined]
    return zeros


def head(module: nn.Linear, axis: Axis) -> ColumnParallelLinear:
    """Vocabulary rows; the logits are gathered, so every rank holds the same ones."""
    return ColumnParallelLinear.from_linear(module, axis, gather_output=True)


def embedding(module: nn.Embedding, axis: Axis, hooks: Hooks) -> VocabParallelEmbedding | None:
    """Vocabulary rows, or None where the class does something that we don't know; it then stays whole."""
    scaled = type(module).__name__.endswith("ScaledWordEmbedding") and len(list(module.parameters())) == 1
    if module.max_norm is not None or not (scaled or type(module) is nn.Embedding):
        return None
    layer = VocabParallelEmbedding.from_embedding(module, axis)
    if scaled:
        hooks.after(layer, _scaler(module))
    return layer


def _scaler(module: nn.Embedding) -> Callable[..., Tensor]:
    """What a scaled embedding multiplies with: a number, or (Gemma) one rounded to the weights' type."""
    plain: Any = module.embed_scale
    rounded = getattr(module, "scalar_embed_scale", None)

    def hook(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out * (plain if rounded is None else torch.tensor(rounded, dtype=out.dtype))

    return hook


def cut_parameter(owner: nn.Module, name: str, dim: int, spans: tuple[range, ...]) -> None:
    """Keep only ``spans`` of a parameter along ``dim``."""
    whole = owner._parameters[name]
    assert whole is not None
    shard = Shard(tuple(whole.shape), dim, spans)
    owner._parameters[name] = sharded(shard.take(whole.detach()), shard)


def experts(module: nn.Module, axis: Axis, path: str, hooks: Hooks) -> None:
    """Every expert's width over the ranks, in place; the module's output is added up by one all-reduce.

    Packed weights are ``(experts, out, in)``, transposed where the class says so, and gate and up are one after the
    other or alternate. A bias after the sum is added by rank 0.
    """
    parameters = dict(module.named_parameters())
    unknown = set(parameters) - {"gate_up_proj", "up_proj", "down_proj", *_EXPERT_BIASES}
    transposed, has_gate, concatenated = EXPERT_LAYOUTS.get(type(module).__name__) or (
        getattr(module, name, None) for name in ("is_transposed", "has_gate", "is_concatenated")
    )
    if unknown or "down_proj" not in parameters or transposed is None:
        why = f"it has {', '.join(sorted(unknown))}" if unknown else "not transformers' packed experts"
        raise UnsupportedError(f"{path} ({type(module).__name__}) can't be split: {why}; pass plan= without it")
    down = parameters["down_proj"]
    width_dim = 1 if transposed else 2
    width = down.shape[width_dim]
    shares = _expert_shares(width, axis.size, max(GROUPED_MM_BYTES // down.element_size(), 1))
    mine = shares[axis.rank]
    compute = mine or range(min(width, len(shares[0])))  # no rank may be without: the kernels take no empty width
    up_spans: tuple[range, ...] = (compute,)
    if has_gate and concatenated:
        up_spans = (compute, range(width + compute.start, width + compute.stop))
    elif has_gate:
        up_spans = (range(2 * compute.start, 2 * compute.stop),)
    for name in set(parameters) & {"gate_up_proj", "up_proj"}:
        cut_parameter(module, name, 3 - width_dim, up_spans)
    for name in set(parameters) & {"gate_up_proj_bias", "up_proj_bias"}:
        cut_parameter(module, name, 1, up_spans)
    cut_parameter(module, "down_proj", width_dim, (compute,))
    if not mine:
        _silence(module, "down_proj")
    if "down_proj_bias" in parameters and axis.rank:
        _silence(module, "down_proj_bias")
    hooks.after(module, lambda module, args, out: collectives.all_reduce(out, axis))


def _silence(owner: nn.Module, name: str) -> None:
    """Zeros in place of a parameter: what this rank computes with it adds nothing."""
    parameter = owner.get_parameter(name)
    owner._parameters[name] = _zeros(parameter, tuple(parameter.shape))


EXPERT_LAYOUTS = {"Llama4TextExperts": (True, True, True)}
"""Whether packed experts are transposed, have a gate, and have it before the rest, where the class doesn't say."""

_EXPERT_BIASES = ("gate_up_proj_bias", "up_proj_bias", "down_proj_bias")


def _expert_shares(width: int, parts: int, unit: int) -> tuple[range, ...]:
    units = partition.split(-(-width // unit), parts)
    return tuple(range(min(s.start * unit, width), min(s.stop * unit, width)) for s in units)


def pack_linears(model: nn.Module) -> None:
    """On the CPU, put the weights of our linear layers in the order that its matrix kernel reads fastest."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, VocabParallelEmbedding)}
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            pack(module, keep_weight=id(module.weight) in tables)


def head_shares(style: str, heads: Heads, width: int, path: str) -> Shares:
    """Everybody's output features of a projection to heads."""
    counts = {"query": heads.query, "key_value": heads.kv}.get(style, heads.query + 2 * heads.kv)
    if width % counts:
        raise UnsupportedError(
            f"{path} has {width} features, which {heads.query} heads over {heads.kv} key/value heads don't divide: "
            "multicard doesn't know this layout; pass plan= without it"
        )
    shares = {
        "query": heads.query_shares,
        "key_value": heads.kv_shares,
        "qkv": heads.fused_shares,
        "qkv_groups": heads.group_shares,
    }
    return shares[style](width)
