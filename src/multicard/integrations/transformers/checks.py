"""Whether a resolved plan is exact for a model: every module that would receive a split tensor must be a known one.

The checks use shapes and names only, before anything is changed; unknown modules are refused.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from multicard.errors import UnsupportedError
from multicard.integrations.heads import Heads
from multicard.integrations.linears import features
from multicard.integrations.transformers.heads import uses_interface
from multicard.integrations.transformers.plans import TO_QUERY, ResolvedPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BY_HEADS = (*TO_QUERY, "key_value", "attention_out", "heads", "key_value_heads", "head_columns")

BEFORE_HEADS = re.compile(r"q_a_proj|kv_a_proj\w*|q_a_layernorm|kv_a_layernorm|q_a_norm|kv_a_norm")
"""The low-rank parts of latent attention, which work on whole tensors."""

PER_HEAD_NORMS = re.compile(r"(q|k|v|query|key|qk)_?(layer)?_?norm(alization)?|norm_[qk]")


WHOLE_WIDTHS = {"embed_dim", "hidden_size", "inner_dim", "d_model", "all_head_size"}
"""Widths by which some families' attention shapes its output; our table's families get the local width instead."""


def check_structure(
    model: PreTrainedModel, plan: ResolvedPlan, attentions: Mapping[str, Heads], *, trusted: bool
) -> None:
    """Refuse a plan that wouldn't be exact.

    Args:
        model: the whole model.
        plan: the styles of its modules.
        attentions: its attention modules' heads, by path.
        trusted: the plan is the caller's: only widths are checked, not names.

    Raises:
        UnsupportedError: names the module and the reason.
    """
    for path, heads in attentions.items():
        _check_attention(model, plan, path, heads, trusted or plan.family(path).rules != {})
    _check_widths(model, plan)
    if not trusted:
        _check_owners(model, plan, attentions)


def _check_attention(model: nn.Module, plan: ResolvedPlan, path: str, heads: Heads, known: bool) -> None:
    module = model.get_submodule(path)
    if not known and not uses_interface(module):
        raise _refused(path, module, "its attention doesn't go through transformers' attention interface")
    read = set(inspect.unwrap(type(module).forward).__code__.co_names) & WHOLE_WIDTHS
    if not known and read:
        raise _refused(path, module, f"its forward reads {', '.join(sorted(read))}, a width that is split")
    outs = [name for name, style in plan.styles.items() if style == "attention_out" and _beside(name, path)]
    if len(outs) != 1:
        raise _refused(path, module, f"the plan has {len(outs)} output projections for it, not one")
    width, _ = features(model.get_submodule(outs[0]))
    if width % heads.query:
        raise _refused(path, module, f"its output projection takes {width} features from {heads.query} heads")
    for name, _ in module.named_parameters(recurse=False):
        if f"{path}.{name}" not in plan.styles:
            raise _refused(path, module, f"its parameter {name!r} isn't in the plan")
    queries, keys = (_head_dims(model, plan, path, heads, style) for style in ("query", "key_value"))
    _check_head_counts(path, module, heads, queries, keys)
    dims = queries | keys
    widths = {count * dim for count in (heads.query, heads.kv) if count > 1 for dim in dims}
    for name, child in module.named_children():
        if plan.styles.get(f"{path}.{name}") in BY_HEADS:
            continue
        _check_bystander(path, module, name, child, plan, widths)


def _beside(name: str, path: str) -> bool:
    """Whether it is the output projection of the attention, in it or in its sibling (BERT)."""
    parent = path.rpartition(".")[0]
    return name.startswith(f"{path}.") or (
        bool(parent) and re.fullmatch(rf"{re.escape(parent)}\.output\.\w+", name) is not None
    )


def _head_dims(model: nn.Module, plan: ResolvedPlan, path: str, heads: Heads, style: str) -> set[int]:
    """The head sizes of the attention's projections of this style."""
    count = heads.query if style == "query" else heads.kv
    own = [name for name, each in plan.styles.items() if name.rpartition(".")[0] == path and each == style]
    return {features(model.get_submodule(name))[1] // count for name in own}


def _check_head_counts(path: str, module: nn.Module, heads: Heads, queries: set[int], keys: set[int]) -> None:
    """Check that heads have one size: a config may have a number of key/value heads that the attention doesn't use."""
    dim = getattr(module, "head_dim", None)
    fit = (
        any(key == dim for key in keys) if isinstance(dim, int) else any(q % k == 0 for q in queries for k in keys if k)
    )
    if keys and queries and not fit:
        raise _refused(
            path,
            module,
            f"{heads.query} query heads of {sorted(queries)} features and {heads.kv} key/value heads of {sorted(keys)} "
            "don't fit together",
        )


def _check_bystander(
    path: str, module: nn.Module, name: str, child: nn.Module, plan: ResolvedPlan, widths: set[int]
) -> None:
    """A child of an attention that isn't split must work on whole tensors, or on each head separately."""
    shapes = {n: tuple(p.shape) for n, p in child.named_parameters() if f"{path}.{name}.{n}" not in plan.styles}
    if BEFORE_HEADS.fullmatch(name) or not (shapes or _is_norm(child)):
        return
    per_head = PER_HEAD_NORMS.fullmatch(name) and all(len(s) == 1 and s[0] not in widths for s in shapes.values())
    if not per_head:
        raise _refused(path, module, f"its child {name!r} ({type(child).__name__}, {shapes}) isn't in the plan")


def _check_widths(model: nn.Module, plan: ResolvedPlan) -> None:
    """The output width of column layers must be the input width of the row layer in the same module."""
    owners: dict[str, dict[str, set[int]]] = {}
    for path, style in plan.styles.items():
        if style in ("column", "gate_up", "row"):
            ins, outs = features(model.get_submodule(path))
            width = {"row": ins, "column": outs, "gate_up": outs // 2}[style]
            owner = re.sub(r"\.(intermediate|output)$", "", path.rpartition(".")[0])
            owners.setdefault(owner, {}).setdefault("row" if style == "row" else "column", set()).add(width)
    for owner, widths in owners.items():
        if widths.get("row") != widths.get("column") or len(widths["row"]) != 1:
            found = {kind: sorted(sizes) for kind, sizes in widths.items()}
            raise _refused(owner, model.get_submodule(owner), f"the widths that the plan splits don't match: {found}")


def _check_owners(model: nn.Module, plan: ResolvedPlan, attentions: Mapping[str, Heads]) -> None:
    """Check that nothing unknown is between a column and a row layer of transformers' own plan."""
    owners = {path.rpartition(".")[0] for path, style in plan.styles.items() if style in ("column", "gate_up")}
    for owner in sorted(owners - set(attentions)):
        if plan.family(owner).rules:
            continue
        module = model.get_submodule(owner)
        planned = {path for path in plan.styles if path.startswith(f"{owner}.") and plan.styles[path] != "whole"}
        for name, _ in module.named_parameters():
            full = f"{owner}.{name}"
            if full not in planned and not any(full.startswith(f"{path}.") for path in planned):
                raise _refused(owner, module, f"its parameter {name!r} isn't in the plan")
        for name, child in module.named_children():
            if _is_norm(child):
                raise _refused(owner, module, f"its child {name!r} ({type(child).__name__}) isn't in the plan")


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a norm without parameters, which only its class name shows."""
    return "norm" in type(module).__name__.lower() and next(module.parameters(), None) is None


def _refused(path: str, module: nn.Module, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{path} ({type(module).__name__}) can't be split by tensor parallelism: {why}; "
        "pass plan={pattern: style} that splits it or leaves it whole"
    )
