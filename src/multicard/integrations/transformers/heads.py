"""Which attention heads each rank computes in a ``transformers`` module.

A module's head counts are set to the local ones (in its attributes and its own copy of the config; the model's config
isn't changed). If a rank's query heads aren't spread evenly over its key/value heads, its attention runs segment by
segment through a function registered with ``transformers``' attention interface.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from multicard.axis import Axis
from multicard.errors import UnsupportedError
from multicard.integrations.heads import Heads
from multicard.integrations.seams import Hooks
from multicard.integrations.transformers.families import Family
from multicard.partition import HeadShard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUERY_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KV_COUNTS = ("num_key_value_heads", "num_kv_heads", "kv_heads", "n_kv_heads")
QUERY_WIDTHS = ("all_head_size",)
SEGMENTED = "multicard_segments"
"""The name under which segment-by-segment attention is registered."""
ATTENDED = "_multicard_attended"
"""The attribute that tells that a module has called segment-by-segment attention."""


def read_heads(module: nn.Module, model: PreTrainedModel, family: Family, axis: Axis, path: str) -> Heads:
    """The head counts of an attention module, from its attributes or its config, split over ``axis``."""
    config = getattr(module, "config", None) or model.config
    query = _count(module, QUERY_COUNTS) or _setting(config, "num_attention_heads")
    if not isinstance(query, int):
        raise UnsupportedError(
            f"{path} ({type(module).__name__}) doesn't say how many heads it has: pass plan= without it"
        )
    groups = getattr(module, "num_key_value_groups", None)
    kv = _count(module, KV_COUNTS) or _setting(config, "num_key_value_heads") or query // (groups or 1)
    if groups is not None and groups * kv != query:
        raise UnsupportedError(
            f"{path} has {query} heads in groups of {groups} but {kv} key/value heads: pass plan= without it"
        )
    shareable = kv in (1, query) or (uses_interface(module) and not family.whole_groups)
    return Heads.split(query, kv, axis, whole_groups=not shareable)


def _setting(config: Any, name: str) -> int | None:
    """A number in a config; None if it has none, or one for each layer (which the layer's module then has)."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def _count(module: nn.Module, names: tuple[str, ...]) -> int | None:
    found = {value for name in names if isinstance(value := getattr(module, name, None), int)}
    return found.pop() if len(found) == 1 else None


def uses_interface(module: nn.Module) -> bool:
    """Whether the module's attention goes through transformers' ``AttentionInterface``."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(module).forward).__code__.co_names


def localize(module: nn.Module, heads: Heads, family: Family, hooks: Hooks) -> None:
    """Set an attention module's head counts to this rank's, and its attention function."""
    mine = heads.mine
    for counts, widths, whole, local in (
        (QUERY_COUNTS, (*QUERY_WIDTHS, *family.query_widths), heads.query, len(mine.query)),
        (KV_COUNTS, family.kv_widths, heads.kv, len(mine.kv)),
    ):
        for name in counts:
            if getattr(module, name, None) == whole:
                setattr(module, name, local)
        for name in widths:
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, getattr(module, name) // whole * local)
    if hasattr(module, "num_key_value_groups"):
        object.__setattr__(module, "num_key_value_groups", len(mine.query) // len(mine.kv) if mine.uniform else None)
    if hasattr(module, "config"):
        object.__setattr__(module, "config", _local_config(module.config, heads))
    if not mine.uniform:
        _attend_by_segments(module, mine)
    for name in family.head_inputs:
        hooks.before(module, functools.partial(_cut_head_input, name, heads))


def _local_config(config: Any, heads: Heads) -> Any:
    local = copy.copy(config)
    names = getattr(config, "attribute_map", {})
    for name, whole, value in (
        ("num_attention_heads", heads.query, len(heads.mine.query)),
        ("num_key_value_heads", heads.kv, len(heads.mine.kv)),
    ):
        if _setting(config, name) == whole:
            local.__dict__[names.get(name, name)] = value
    return local


def _cut_head_input(
    name: str, heads: Heads, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = kwargs.get(name)
    if isinstance(x, Tensor) and x.dim() >= 3:
        kwargs = {**kwargs, name: _cut_heads(x, heads)}
    return args, kwargs


def _cut_heads(x: Tensor, heads: Heads) -> Tensor:
    """``(batch, heads, ...)`` or ``(batch · heads, ...)`` with this rank's heads; unchanged if all heads share it."""
    mine = slice(heads.mine.query.start, heads.mine.query.stop)
    if x.dim() == 4:
        return x[:, mine] if x.shape[1] == heads.query and heads.query > 1 else x
    return x.unflatten(0, (-1, heads.query))[:, mine].flatten(0, 1)


class _Segment:
    """One segment's view of an attention module: all attributes are the module's, except head counts."""

    def __init__(self, module: nn.Module, query: range, kv: range) -> None:
        self.module, self.query, self.kv = module, slice(query.start, query.stop), slice(kv.start, kv.stop)
        self.num_key_value_groups = len(query) // len(kv)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        return value[self.query] if name == "sinks" else value


def _attend_by_segments(module: nn.Module, shard: HeadShard) -> None:
    if hasattr(module, "_multicard_sequence"):  # attention over a split sequence handles segments itself
        object.__setattr__(module, "_multicard_segments", shard.segments)
        return
    register()
    # Plain attributes, not submodules, because a segment refers back to its module.
    object.__setattr__(module, "_multicard_segments", [_Segment(module, *segment) for segment in shard.segments])
    config = module.config.__dict__  # the module's own copy; a part of a larger model may have its own implementation
    object.__setattr__(module, "_multicard_attention", config.get("_attn_implementation_internal") or "eager")
    config["_attn_implementation_internal"] = SEGMENTED


def attention_function(module: nn.Module, name: str) -> Any:
    """transformers' attention function ``name`` for ``module``."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def attend_by_segments(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of query heads that aren't spread evenly over key/value heads: one grouped-query call a segment.

    Args and result are those of ``transformers``' attention interface: ``(batch, heads, length, head_dim)`` in,
    ``(batch, length, heads, head_dim)`` out.
    """
    vars(module)[ATTENDED] = True
    attend = attention_function(module, vars(module)["_multicard_attention"])
    outs = []
    for segment in vars(module)["_multicard_segments"]:
        local = {name: _segment_input(x, segment, query.shape[1]) for name, x in kwargs.items()}
        mask = _segment_input(attention_mask, segment, query.shape[1])
        q, k, v = query[:, segment.query], key[:, segment.kv], value[:, segment.kv]
        outs.append(attend(segment, q, k, v, mask, **local)[0])
    return torch.cat(outs, 2), None


def _segment_input(x: Any, segment: _Segment, heads: int) -> Any:
    if not isinstance(x, Tensor):
        return x
    if x.dim() == 4 and x.shape[1] == heads:
        return x[:, segment.query]
    return x[segment.query] if x.dim() == 1 and x.shape[0] == heads else x  # attention sinks


def register() -> None:
    """Register segment-by-segment attention with ``transformers``; a second call does nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(SEGMENTED, attend_by_segments)
