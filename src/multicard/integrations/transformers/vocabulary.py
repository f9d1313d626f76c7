"""Splits a ``transformers`` model's vocabulary: its embedding tables and its output head, tied or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from multicard.axis import Axis
from multicard.errors import UnsupportedError
from multicard.integrations.linears import check_linear, column_parallel
from multicard.integrations.quantized import quantized
from multicard.integrations.seams import Hooks
from multicard.integrations.styles import Change, places_in, replace
from multicard.layers import VocabParallelEmbedding

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def vocabulary_changes(model: PreTrainedModel, axis: Axis, hooks: Hooks) -> list[Change]:
    """Split input embeddings and output head by vocabulary, with one shared parameter if they are tied.

    An embedding or head of an unknown class stays whole on every rank.
    """
    try:
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:  # several towers, each with its own (CLIP): they stay whole
        return []
    weight = getattr(table, "weight", None)
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is weight]
    if not (isinstance(table, nn.Embedding) and all(map(_is_known_table, tables))):
        tables = []
    if not _is_plain(head):
        head = None
    tied = head is not None and head.weight is weight
    return [lambda: _split(model, tables, head, tied, axis, hooks)]


def head_paths(model: PreTrainedModel) -> list[str]:
    """Where the output head is."""
    try:
        head = model.get_output_embeddings()
    except NotImplementedError:
        return []
    return [path for path, module in model.named_modules(remove_duplicate=False) if module is head]


def _split(
    model: nn.Module, tables: list[nn.Embedding], head: nn.Module | None, tied: bool, axis: Axis, hooks: Hooks
) -> None:
    shared: nn.Parameter | None = None
    places = places_in(model)
    for table in tables:
        layer = VocabParallelEmbedding.from_embedding(table, axis)
        layer.weight = shared = shared if shared is not None else layer.weight
        if _is_scaled(table):
            hooks.after(layer, _scaler(table))
        replace(layer, places[table])
    if head is not None:
        gathered = column_parallel(head, axis, "the output head", gather_output=True)
        if tied and shared is not None:
            gathered.weight = shared
        replace(gathered, places[head])


def _is_plain(head: nn.Module | None) -> bool:
    try:
        return isinstance(head, nn.Linear) and bool(check_linear(head, "the output head"))
    except UnsupportedError:
        return False


def _is_known_table(table: nn.Embedding) -> bool:
    plain = type(table) is nn.Embedding or _is_scaled(table)
    return plain and table.max_norm is None and quantized(table) is None


def _is_scaled(table: nn.Embedding) -> bool:
    return type(table).__name__.endswith("ScaledWordEmbedding") and len(list(table.parameters())) == 1


def _scaler(table: nn.Embedding) -> Callable[..., Tensor]:
    """The factor of a scaled embedding: a number, or (Gemma) a number rounded to the weights' dtype."""
    plain: Any = table.embed_scale
    rounded = getattr(table, "scalar_embed_scale", None)

    def hook(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out * (plain if rounded is None else torch.tensor(rounded, dtype=out.dtype))

    return hook
