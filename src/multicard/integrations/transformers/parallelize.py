"""``transformers`` models split over a mesh in place: ``generate()`` and the modelling code stay what they are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from multicard.axis import Axis
from multicard.errors import UnsupportedError
from multicard.integrations import styles
from multicard.integrations.heads import Heads, localize, read_heads
from multicard.integrations.seams import Hooks, facts
from multicard.integrations.transformers import load as loading
from multicard.integrations.transformers.checks import check_structure
from multicard.integrations.transformers.doors import open_door
from multicard.integrations.transformers.families import FUSED, HEAD_STYLES
from multicard.integrations.transformers.generate import guard
from multicard.integrations.transformers.plans import ResolvedPlan, resolve_plan
from multicard.integrations.transformers.sources import Sources
from multicard.mesh import ParallelMesh
from multicard.replica import Replica
from multicard.weights import LoadReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from multicard.integrations.transformers.sequence import Sequence


def parallelize(model: PreTrainedModel, mesh: ParallelMesh, plan: Mapping[str, str] | None = None) -> PreTrainedModel:
    """Split ``model`` over ``mesh`` in place, and return it. Every rank must call it on the same model.

    Args:
        model: any ``transformers`` model with a plan of its own or of ours; on the meta device it stays there.
        mesh: its tp axis splits weights; ring and ulysses split the prompt and the cache.
        plan: ``{pattern: style}`` instead of ours, with styles from ``families.STYLES``.

    Raises:
        ConfigError: the plan doesn't fit the model.
        UnsupportedError: the model can't be split exactly; the message names the module and why.
        MismatchError: ranks have different models.
    """
    Replica(mesh).compare("mc.parallelize", facts(model))
    opened = _split(model, mesh, plan)
    if model.device.type != "meta":
        nn.Module.to(model, mesh.device)
    _finish(model, mesh, *opened)
    return model


def _split(model: PreTrainedModel, mesh: ParallelMesh, plan: Mapping[str, str] | None) -> tuple[Hooks, Sequence | None]:
    """Weights over tp, the sequence over ring and ulysses; what can't be is refused before anything is changed."""
    hooks, split = Hooks("transformers"), None
    if mesh.sequence.size > 1:
        from multicard.integrations.transformers import sequence

        sequence.check(model, mesh)
        split = sequence.attach(model, mesh, hooks)
    split_tensors(model, mesh.tp, hooks, plan)
    return hooks, split


def _finish(model: PreTrainedModel, mesh: ParallelMesh, hooks: Hooks, sequence: Sequence | None) -> None:
    guard(model, mesh)
    if mesh.tp.size * mesh.sequence.size > 1:
        open_door(model, mesh, hooks, sequence)
    model.requires_grad_(False).eval()
    styles.pack_linears(model)


def from_pretrained(
    path: str | os.PathLike[str],
    mesh: ParallelMesh,
    *,
    model_class: type[PreTrainedModel] | None = None,
    dtype: torch.dtype | str | None = None,
    plan: Mapping[str, str] | None = None,
    **overrides: Any,
) -> PreTrainedModel:
    """A ``transformers`` checkpoint as a model split over ``mesh``; every rank reads its own slices only.

    Args:
        path: a folder with a config and safetensors files.
        mesh: as for :func:`parallelize`.
        model_class: the class to build; None: what the config names.
        dtype: of the weights; None or "auto": the config's.
        plan: as for :func:`parallelize`.
        overrides: values for the config (``attn_implementation="eager"``).

    Raises:
        CheckpointError: files or tensors are missing, damaged or of another shape; the same on every rank.
        UnsupportedError, ConfigError: as for :func:`parallelize`.
    """
    return load_model(path, mesh, model_class, dtype, plan, **overrides)[0]


def load_model(
    path: str | os.PathLike[str],
    mesh: ParallelMesh,
    model_class: type[PreTrainedModel] | None = None,
    dtype: torch.dtype | str | None = None,
    plan: Mapping[str, str] | None = None,
    checksums: bool = False,
    **overrides: Any,
) -> tuple[PreTrainedModel, LoadReport]:
    """:func:`from_pretrained`, and what the loading took."""
    model = loading.build(path, model_class, dtype, **overrides)
    Replica(mesh).compare("mc.from_pretrained", facts(model))
    sources = Sources(model)
    opened = _split(model, mesh, plan)
    report = loading.load(model, path, mesh, sources, checksums)
    _finish(model, mesh, *opened)
    return model, report


def split_tensors(model: PreTrainedModel, axis: Axis, hooks: Hooks, plan: Mapping[str, str] | None = None) -> None:
    """Tensor parallel only: each rank keeps its part of every planned module."""
    if axis.size == 1:
        return
    resolved = resolve_plan(model, plan)
    attentions = _attentions(model, resolved, axis)
    check_structure(model, resolved, attentions, trusted=plan is not None)
    for path, style in resolved.styles.items():
        if style not in ("whole", "embedding", "head"):
            _convert(model, path, style, _heads_of(path, attentions) if style in HEAD_STYLES else None, axis, hooks)
    for path, heads in attentions.items():
        localize(model.get_submodule(path), heads, resolved.family(path), hooks)
    _split_vocabulary(model, axis, hooks)


def _attentions(model: PreTrainedModel, resolved: ResolvedPlan, axis: Axis) -> dict[str, Heads]:
    """The attention modules of the plan: those that own a projection to heads."""
    owners = {path.rpartition(".")[0] for path, style in resolved.styles.items() if style in ("query", *FUSED)}
    return {
        path: read_heads(model.get_submodule(path), model, resolved.family(path), axis, path) for path in sorted(owners)
    }


def _heads_of(path: str, attentions: Mapping[str, Heads]) -> Heads:
    """The heads of the attention that ``path`` belongs to: its owner's, or the nearest's (BERT's output projection)."""
    parent = path
    while parent:
        parent = parent.rpartition(".")[0]
        near = [owner for owner in attentions if owner == parent or owner.startswith(f"{parent}.") or not parent]
        if near:
            return attentions[near[0]]
    raise UnsupportedError(f"the plan splits {path} by heads, but no query projection is near it")


def _convert(model: nn.Module, path: str, style: str, heads: Heads | None, axis: Axis, hooks: Hooks) -> None:
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    if name in owner._parameters:
        _cut(owner, name, style, heads, path)
        return
    module = owner.get_submodule(name)
    if style == "experts":
        styles.experts(module, axis, path, hooks)
    elif style == "head_columns" and heads is not None:
        shares = heads.query_shares(module.get_parameter("weight").shape[1])
        styles.cut_parameter(module, "weight", 1, shares[axis.rank])
    else:
        _replace(model, module, _parallel(module, style, heads, axis, path))


def _parallel(module: nn.Module, style: str, heads: Heads | None, axis: Axis, path: str) -> nn.Module:
    if style == "gate_up":
        return styles.gate_up(module, axis, path)
    if style == "row":
        return styles.row(module, axis, None, path)
    if style == "column":
        return styles.column(module, axis, None, path)
    assert heads is not None
    linear = styles.as_linear(module, path)
    if style == "attention_out":
        width = linear.in_features
        idle = width // heads.query if heads.idle else 0
        return styles.row(module, axis, heads.output_shares(width), path, idle)
    return styles.column(module, axis, styles.head_shares(style, heads, linear.out_features, path), path)


def _cut(owner: nn.Module, name: str, style: str, heads: Heads | None, path: str) -> None:
    if style not in ("heads", "key_value_heads") or heads is None:
        raise UnsupportedError(f"{path} is a parameter, which can't be split by {style!r}: pass plan=")
    rows = owner.get_parameter(name).shape[0]
    shares = heads.query_shares(rows) if style == "heads" else heads.kv_shares(rows)
    styles.cut_parameter(owner, name, 0, shares[heads.rank])


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is: one module may stand in several places."""
    for owner in list(model.modules()):
        for name, child in owner._modules.items():
            if child is old:
                owner._modules[name] = new


def _split_vocabulary(model: PreTrainedModel, axis: Axis, hooks: Hooks) -> None:
    """Input embeddings and the output head by vocabulary rows, one shared parameter where they are tied."""
    try:
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:  # several towers, each with its own (CLIP): they stay whole
        return
    whole, shared = getattr(table, "weight", None), None
    tied = isinstance(head, nn.Linear) and head.weight is whole
    if isinstance(table, nn.Embedding):
        tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is whole]
        splits = [styles.embedding(table, axis, hooks) for table in tables]
        for old, new in zip(tables, splits, strict=True):
            if new is None or None in splits:
                continue
            new.weight = shared = shared if shared is not None else new.weight
            _replace(model, old, new)
    if isinstance(head, nn.Linear):
        parallel = styles.head(head, axis)
        _replace(model, head, parallel)
        if tied and shared is not None:
            parallel.weight = shared
