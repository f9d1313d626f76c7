"""Tensor parallel for diffusers' transformers: attention by heads, feed-forward by width, any degree up to heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from multicard import partition
from multicard.axis import Axis
from multicard.errors import ConfigError, UnsupportedError
from multicard.integrations.diffusers.plans import TENSOR, TENSOR_STYLES
from multicard.integrations.plan import make_plan, resolve
from multicard.layers import ColumnParallelLinear, ParallelRMSNorm, RowParallelLinear, even_shares
from multicard.layers.shard import Shares

TO_HEADS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
FROM_HEADS = ("to_out", "to_add_out")
NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
PLAIN_ACTIVATIONS, GATED_ACTIVATIONS = ("GELU", "ApproximateGELU", "LinearActivation"), ("GEGLU", "SwiGLU")

Change = Callable[[], object]


def tensor_plan(model: nn.Module) -> Mapping[str, str]:
    """The model's own ``_tp_plan`` in our styles, or ours.

    Raises:
        UnsupportedError: there is neither.
    """
    own, name = getattr(model, "_tp_plan", None), type(model).__name__
    if own:
        return _translate(own)
    if name not in TENSOR:
        raise UnsupportedError(
            f"{name} has no tensor-parallel plan, of its own or here; docs/diffusion.md lists the models that have. "
            "Use cfg or dp, or pass plan={'tensor': {pattern: style}}"
        )
    return TENSOR[name]


def _translate(own: Mapping[str, Any]) -> dict[str, str]:
    """diffusers' plan names every linear layer; here an attention is one thing, because its heads may be uneven."""
    plan = {}
    attentions = {path.rpartition(".")[0] for path in own if path.endswith((".to_q", ".to_qkv_mlp_proj"))}
    for path, style in own.items():
        owner = next((a for a in attentions if path.startswith(a + ".")), None)
        if owner is not None:
            plan[owner] = "attention_mlp" if f"{owner}.to_qkv_mlp_proj" in own else "attention"
        elif style in ("colwise", "rowwise"):
            plan[path] = {"colwise": "column", "rowwise": "row"}[style]
        elif type(style).__name__ == "PackedColwiseParallel" and style.blocks == [1, 1]:
            plan[path] = "gated"
        elif type(style).__name__ == "PackedRowwiseParallel" and style.blocks is None:
            plan[path] = "attention_mlp_row"
        else:
            raise UnsupportedError(f"_tp_plan: the style {style!r} of {path} isn't known here; pass plan=")
    return plan


def tensor_changes(model: nn.Module, axis: Axis, plan: Mapping[str, str]) -> list[Change]:
    """What has to be done to ``model``, checked but not yet done.

    Raises:
        ConfigError: the plan doesn't fit the model.
        UnsupportedError: a layer that can't be split exactly; the message names it.
    """
    rules = make_plan(plan, optional=plan is TENSOR.get(type(model).__name__))
    paths = [path for path, _ in model.named_modules() if path]
    styles = resolve(rules, paths, TENSOR_STYLES, type(model).__name__)
    if not styles:
        raise ConfigError(f"the tensor plan of {type(model).__name__} matches none of its modules")
    changes: list[Change] = []
    for path, style in styles.items():
        module = model.get_submodule(path)
        if style == "attention":
            changes += _attention(module, axis, path)
        elif style == "feed_forward":
            changes += _feed_forward(module, axis, path)
        elif style == "attention_mlp":
            changes += _attention_mlp(module, axis, path)
        elif style == "attention_mlp_row":
            attention = model.get_submodule(path.rpartition(".")[0] + ".attn")
            changes.append(_row(model, path, axis, _behind_heads(attention, _linear(module, path), axis, path)))
        elif style == "head_columns":
            changes.append(_head_columns(model, module, axis))
        elif style == "row":
            changes.append(_row(model, path, axis))
        else:
            halves = _halves(_linear(module, path).out_features, axis) if style == "gated" else None
            changes.append(_column(model, path, axis, halves))
    return changes


# Styles


def _attention(attention: Any, axis: Axis, path: str) -> list[Change]:
    heads, size = _heads(attention, axis, path)
    known = (*TO_HEADS, *FROM_HEADS, *NORMS)
    if other := {name.partition(".")[0] for name, _ in attention.named_parameters()} - set(known):
        raise UnsupportedError(f"{path}: tensor parallelism doesn't know its {', '.join(sorted(other))}")
    shares = _head_shares(heads, size, axis)
    changes = [_column(attention, name, axis, shares, heads * size) for name in TO_HEADS if _has(attention, name)]
    for name in FROM_HEADS:
        if _has(attention, name):
            inner = f"{name}.0" if isinstance(getattr(attention, name), nn.ModuleList) else name
            changes.append(_row(attention, inner, axis, shares))
    for name in NORMS:
        changes += _norm(attention, name, axis, shares, heads, size, path)
    return [*changes, lambda: _shrink(attention, heads, size, axis)]


def _norm(attention: Any, name: str, axis: Axis, shares: Shares, heads: int, size: int, path: str) -> list[Change]:
    """A norm within a head stays; one over all heads sums its squares over the ranks."""
    norm = getattr(attention, name, None)
    width = _width(norm)
    if norm is None or width in (None, size):
        return []
    if type(norm).__name__ != "RMSNorm" or width != heads * size or getattr(norm, "bias", None) is not None:
        raise UnsupportedError(f"{path}.{name}: a {type(norm).__name__} over {width} features can't be split")
    parallel = ParallelRMSNorm(width, axis, norm.eps, norm.weight, shares)
    return [lambda: setattr(attention, name, parallel)]


def _feed_forward(module: Any, axis: Axis, path: str) -> list[Change]:
    net: Any = getattr(module, "net", None)
    kind = type(net[0]).__name__ if isinstance(net, nn.ModuleList) else type(module).__name__
    if kind not in PLAIN_ACTIVATIONS + GATED_ACTIVATIONS or not isinstance(net, nn.ModuleList):
        raise UnsupportedError(f"{path}: tensor parallelism doesn't know the feed-forward {kind}")
    linear = _linear(module.get_submodule("net.0.proj"), f"{path}.net.0.proj")
    shares = _halves(linear.out_features, axis) if kind in GATED_ACTIVATIONS else None
    return [_column(net[0], "proj", axis, shares), _row(module, "net.2", axis)]


def _attention_mlp(attention: Any, axis: Axis, path: str) -> list[Change]:
    """Flux 2's single block: query, key, value, gate and up in one projection; heads and MLP back in another."""
    heads, size = _heads(attention, axis, path)
    inner, hidden, mult = attention.inner_dim, attention.mlp_hidden_dim, attention.mlp_mult_factor
    by_head, by_width = _head_shares(heads, size, axis), even_shares(hidden, axis.size)
    into = _concatenated([(by_head, inner)] * 3 + [(by_width, hidden)] * mult)
    back = _concatenated([(by_head, inner), (by_width, hidden)])

    def shrink() -> None:
        _shrink(attention, heads, size, axis)
        attention.mlp_hidden_dim = len(partition.split(hidden, axis.size)[axis.rank])

    return [
        _column(attention, "to_qkv_mlp_proj", axis, into, 3 * inner + mult * hidden),
        _row(attention, "to_out", axis, back),
        shrink,
    ]


def _head_columns(model: Any, module: nn.Module, axis: Axis) -> Change:
    heads = model.config.num_attention_heads

    def take(module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (mine,) = _head_shares(heads, output[0].shape[-1] // heads, axis)[axis.rank]
        return tuple(x[..., mine.start : mine.stop] for x in output)

    return lambda: _discard(module.register_forward_hook(take))


def _behind_heads(attention: Any, linear: nn.Linear, axis: Axis, path: str) -> Shares:
    heads, size = _heads(attention, axis, path)
    rest = linear.in_features - heads * size
    return _concatenated([(_head_shares(heads, size, axis), heads * size), (even_shares(rest, axis.size), rest)])


# Shares


def _heads(attention: Any, axis: Axis, path: str) -> tuple[int, int]:
    """Heads in all, and their size."""
    heads = attention.heads
    query = getattr(attention, "to_q", None)
    size = (query.out_features if query is not None else attention.inner_dim) // heads
    key = getattr(attention, "to_k", None)
    if key is not None and key.out_features != heads * size:
        raise UnsupportedError(f"{path}: fewer key/value heads than query heads aren't covered; use ulysses or ring")
    if axis.size > heads:
        raise UnsupportedError(f"{path}: tp={axis.size} over {heads} heads would leave a rank without; use tp={heads}")
    return heads, size


def _head_shares(heads: int, size: int, axis: Axis) -> Shares:
    return tuple((range(mine.start * size, mine.stop * size),) for mine in partition.split(heads, axis.size))


def _halves(width: int, axis: Axis) -> Shares:
    half = width // 2
    return _concatenated([(even_shares(half, axis.size), half)] * 2)


def _concatenated(blocks: list[tuple[Shares, int]]) -> Shares:
    """Shares of blocks that stand one behind the other, each with its width."""
    shares: list[tuple[range, ...]] = [()] * len(blocks[0][0])
    start = 0
    for block, width in blocks:
        for rank, spans in enumerate(block):
            shares[rank] += tuple(range(start + s.start, start + s.stop) for s in spans)
        start += width
    return tuple(shares)


# Modules


def _column(owner: nn.Module, path: str, axis: Axis, shares: Shares | None = None, width: int | None = None) -> Change:
    linear = _linear(owner.get_submodule(path), path)
    if width is not None and linear.out_features != width:
        raise UnsupportedError(f"{path} has {linear.out_features} output features where {width} were expected")
    return lambda: _replace(owner, path, ColumnParallelLinear.from_linear(linear, axis, shares=shares))


def _row(owner: nn.Module, path: str, axis: Axis, shares: Shares | None = None) -> Change:
    linear = _linear(owner.get_submodule(path), path)
    return lambda: _replace(owner, path, RowParallelLinear.from_linear(linear, axis, shares=shares))


def _linear(module: nn.Module, path: str) -> nn.Linear:
    if type(module) is not nn.Linear:
        raise UnsupportedError(
            f"{path} is a {type(module).__name__}, not a plain linear layer (adapters, quantization): "
            "tensor parallelism can't split it; fuse or unload adapters first"
        )
    return module


def _replace(owner: nn.Module, path: str, module: nn.Module) -> None:
    owner.set_submodule(path, module)


def _discard(handle: Any) -> None:
    """A hook that stays for good."""


def _has(attention: nn.Module, name: str) -> bool:
    return getattr(attention, name, None) is not None


def _width(norm: nn.Module | None) -> int | None:
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor):
        return weight.numel()
    shape = getattr(norm, "normalized_shape", getattr(norm, "dim", None))
    return shape[-1] if isinstance(shape, (tuple, list)) else None


def _shrink(attention: Any, heads: int, size: int, axis: Axis) -> None:
    """The numbers that processors read, for this rank's heads."""
    mine = len(partition.split(heads, axis.size)[axis.rank])
    attention.heads = mine
    for name in ("inner_dim", "inner_kv_dim"):
        if hasattr(attention, name):
            setattr(attention, name, mine * size)
