"""Packed mixture-of-experts weights, split over ranks by every expert's width."""

from __future__ import annotations

from torch import nn

from multicard import collectives, partition
from multicard.errors import UnsupportedError
from multicard.integrations.adapters import check_adapter, is_adapter
from multicard.integrations.quantized import check_plain, quantized_tensor
from multicard.integrations.styles import Change, Context, cut_parameter, zeros
from multicard.layers.shard import Spans

GROUPED_MM_BYTES = 16
"""torch's grouped matrix product needs rows of a multiple of this many bytes, so experts are split in such units."""

LAYOUTS = {"Llama4TextExperts": (True, True, True)}
"""If the class doesn't say: whether packed experts are transposed, have a gate, and have it before the rest."""

BIASES = ("gate_up_proj_bias", "up_proj_bias", "down_proj_bias")


def experts(module: nn.Module, context: Context) -> Change:
    """Split every expert by width, in place; one all-reduce sums the module's outputs.

    Packed weights are ``(experts, out, in)``, or transposed if the class says so; gate and up are one after the other
    or alternate. A bias after the sum is added by rank 0.
    """
    if is_adapter(module):
        check_adapter(module, context.path)
    layout = LAYOUTS.get(type(module).__name__) or tuple(
        getattr(module, name, None) for name in ("is_transposed", "has_gate", "is_concatenated")
    )
    parameters = dict(module.named_parameters())
    unknown = set(parameters) - {"gate_up_proj", "up_proj", "down_proj", *BIASES}
    if unknown or "down_proj" not in parameters or layout[0] is None:
        why = f"it has {', '.join(sorted(unknown))}" if unknown else "not transformers' packed experts"
        raise UnsupportedError(f"{context.path} ({type(module).__name__}) can't be split: {why}; pass plan= without it")
    for name, parameter in parameters.items():
        check_plain(f"{context.path}.{name}", quantized_tensor(parameter))
    return lambda: _split(module, context, *layout)


def _split(module: nn.Module, context: Context, transposed: bool, has_gate: bool, concatenated: bool) -> None:
    rank, parameters = context.axis.rank, set(dict(module.named_parameters()))
    down = module.get_parameter("down_proj")
    width_dim = 1 if transposed else 2
    width = down.shape[width_dim]
    shares = _shares(width, context.axis.size, max(GROUPED_MM_BYTES // down.element_size(), 1))
    mine = shares[rank]
    compute = mine or range(min(width, len(shares[0])))  # no rank may have an empty width: the kernels don't take one
    up: Spans = (compute,)
    if has_gate and concatenated:
        up = (compute, range(width + compute.start, width + compute.stop))
    elif has_gate:
        up = (range(2 * compute.start, 2 * compute.stop),)
    for name in parameters & {"gate_up_proj", "up_proj"}:
        cut_parameter(module, name, 3 - width_dim, up)
    for name in parameters & {"gate_up_proj_bias", "up_proj_bias"}:
        cut_parameter(module, name, 1, up)
    cut_parameter(module, "down_proj", width_dim, (compute,))
    if not mine:
        _silence(module, "down_proj")
    if "down_proj_bias" in parameters and rank:
        _silence(module, "down_proj_bias")
    context.hooks.after(module, lambda module, args, out: collectives.all_reduce(out, context.axis))


def _silence(owner: nn.Module, name: str) -> None:
    """Zeros in place of a parameter, so that this rank's product with it adds nothing."""
    parameter = owner.get_parameter(name)
    owner._parameters[name] = zeros(parameter, tuple(parameter.shape))


def _shares(width: int, parts: int, unit: int) -> tuple[range, ...]:
    units = partition.split(-(-width // unit), parts)
    return tuple(range(min(s.start * unit, width), min(s.stop * unit, width)) for s in units)
