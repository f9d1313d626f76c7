"""The styles of a ``diffusers`` plan: the common ones, those that only this library needs, and names for whole blocks,
which stand for the styles of their parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from multicard import partition
from multicard.errors import UnsupportedError
from multicard.integrations import styles
from multicard.integrations.diffusers.heads import projections
from multicard.integrations.linears import check_linear
from multicard.integrations.rest import gathered
from multicard.integrations.styles import Change, Context, Style, replace, replaced_by_column, replaced_by_row
from multicard.layers import ParallelRMSNorm, even_shares
from multicard.layers.shard import concatenated

FROM_HEADS = ("to_out", "to_add_out")
NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
PLAIN_ACTIVATIONS, GATED_ACTIVATIONS = ("GELU", "ApproximateGELU", "LinearActivation"), ("GEGLU", "SwiGLU")


def heads_norm(module: nn.Module, context: Context) -> Change:
    """Split a norm over the features of all heads; its squares are summed over ranks. A norm within a head is kept."""
    heads, width, norm = context.heads, norm_width(module), module
    if type(norm).__name__ != "RMSNorm" or width is None or getattr(norm, "bias", None) is not None:
        raise UnsupportedError(f"{context.path}: a {type(norm).__name__} over {width} features can't be split")
    eps: Any = norm.eps
    weight: Any = norm.weight
    return lambda: replace(
        ParallelRMSNorm(width, context.axis, eps, weight, heads.query_shares(width)), context.places[norm]
    )


def head_outputs(module: nn.Module, context: Context) -> Change:
    """Split the output of a module that has all heads side by side (rotary embeddings before heads are separated)."""
    heads = context.heads

    def take(module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (mine,) = heads.query_shares(output[0].shape[-1])[heads.rank]
        return tuple(x[..., mine.start : mine.stop] for x in output)

    return lambda: context.hooks.after(module, take)


def attention_mlp_row(module: nn.Module, context: Context) -> Change:
    """A row-parallel layer; its input is an attention's heads, then an MLP's features."""
    width, _ = check_linear(module, context.path)
    inner = _inner_width(_attention_of(context), context.path)
    hidden = width - inner
    heads, mlp = context.heads.output_shares(inner), even_shares(hidden, context.axis.size)
    return replaced_by_row(module, context, concatenated([(heads, inner), (mlp, hidden)]))


def attention_mlp_column(module: nn.Module, context: Context) -> Change:
    """A column-parallel layer; its output is query, key, value, then an MLP's features (Flux 2's gate and up)."""
    attention = _attention_of(context)
    inner, hidden, mult = _inner_width(attention, context.path), attention.mlp_hidden_dim, attention.mlp_mult_factor
    _, width = check_linear(module, context.path)
    if width != 3 * inner + mult * hidden:
        raise UnsupportedError(f"{context.path} has {width} output features, not 3 × {inner} + {mult} × {hidden}")
    size, rank = context.axis.size, context.axis.rank
    heads, mlp = context.heads.query_shares(inner), even_shares(hidden, size)
    change = replaced_by_column(module, context, concatenated([(heads, inner)] * 3 + [(mlp, hidden)] * mult))

    def with_its_width() -> None:
        change()
        attention.mlp_hidden_dim = len(partition.split(hidden, size)[rank])

    return with_its_width


STYLES: dict[str, Style] = {
    **styles.STYLES,
    "heads_norm": heads_norm,
    "head_outputs": head_outputs,
    "attention_mlp_row": attention_mlp_row,
    "attention_mlp_column": attention_mlp_column,
    "gathered": gathered,
}
"""By name."""


# Blocks


def attention(module: Any, path: str) -> dict[str, str]:
    """Split projections to heads by output, those from heads by input, norms over all heads with one all-reduce."""
    known = (*projections(module), *FROM_HEADS, *NORMS)
    if other := {name.partition(".")[0] for name, _ in module.named_parameters()} - set(known):
        raise UnsupportedError(f"{path}: tensor parallelism doesn't know its {', '.join(sorted(other))}")
    found, width = dict.fromkeys(projections(module), "query"), _inner_width(module, path)
    for name in FROM_HEADS:
        if (out := getattr(module, name, None)) is not None:
            inner = f"{name}.0" if isinstance(out, nn.ModuleList) else name
            found[inner] = "attention_out"
            if (taken := check_linear(module.get_submodule(inner), f"{path}.{inner}")[0]) != width:
                raise UnsupportedError(f"{path}.{inner} takes {taken} features and the heads have {width}")
    size = width // module.heads
    found |= {name: "heads_norm" for name in NORMS if norm_width(getattr(module, name, None)) not in (None, size)}
    return found


def feed_forward(module: Any, path: str) -> dict[str, str]:
    """diffusers' ``FeedForward``: the width of its hidden layer."""
    net: Any = getattr(module, "net", None)
    kind = type(net[0]).__name__ if isinstance(net, nn.ModuleList) else type(module).__name__
    if kind not in PLAIN_ACTIVATIONS + GATED_ACTIVATIONS or not isinstance(net, nn.ModuleList):
        raise UnsupportedError(f"{path}: tensor parallelism doesn't know the feed-forward {kind}")
    return {"net.0.proj": "gate_up" if kind in GATED_ACTIVATIONS else "column", "net.2": "row"}


def attention_mlp(module: Any, path: str) -> dict[str, str]:
    """Flux 2's single block: query, key, value, gate and up in one projection; heads and MLP back in another."""
    return {"to_qkv_mlp_proj": "attention_mlp_column", "to_out": "attention_mlp_row"}


def gated(module: Any, path: str) -> dict[str, str]:
    """A linear layer with an output of two halves that are combined elementwise: another name for "gate_up"."""
    return {"": "gate_up"}


BLOCKS: Mapping[str, Callable[[Any, str], dict[str, str]]] = {
    "attention": attention,
    "attention_mlp": attention_mlp,
    "feed_forward": feed_forward,
    "gated": gated,
}
"""Names for whole blocks: each gives the styles of its parts, by path within the block."""


def norm_width(norm: nn.Module | None) -> int | None:
    """The number of features of a norm; None if unknown."""
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor):
        return weight.numel()
    shape = getattr(norm, "normalized_shape", getattr(norm, "dim", None))
    return shape[-1] if isinstance(shape, (tuple, list)) else None


def _inner_width(attention: Any, path: str) -> int:
    """The number of features of all heads together; ``path`` is for errors."""
    query = getattr(attention, "to_q", None)
    return attention.inner_dim if query is None else check_linear(query, f"{path}.to_q")[1]


def _attention_of(context: Context) -> Any:
    """The attention around the module, or next to it."""
    owner = context.model.get_submodule(context.path.rpartition(".")[0])
    return owner if hasattr(owner, "heads") else owner.get_submodule("attn")
