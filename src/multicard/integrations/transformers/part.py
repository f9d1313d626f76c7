"""A ``transformers`` model as a part of a pipeline: split by weights alone, in memory or as it is read.

Its layers may be called without the model, and may move to another device or dtype, so weights stay in row order.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from multicard.integrations.seams import Hooks, facts
from multicard.integrations.styles import Change, make
from multicard.integrations.transformers import load as loading
from multicard.integrations.transformers.parallelize import finish
from multicard.integrations.transformers.sources import Sources
from multicard.integrations.transformers.tensor import tensor_changes
from multicard.mesh import ParallelMesh
from multicard.weights import Checkpoint, LoadReport, check

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def weight_changes(model: PreTrainedModel, mesh: ParallelMesh) -> list[Change]:
    """The changes that split all of ``model`` over ``mesh.tp``, and its door: checked, not made yet.

    Raises:
        UnsupportedError: the model can't be split exactly; the message names the module and why.
    """
    hooks = Hooks("transformers")
    found = tensor_changes(model, mesh.tp, hooks, all_linears=True)
    return [*found, lambda: finish(model, mesh, hooks, None)]


def outline(
    model_class: type[PreTrainedModel],
    path: str | os.PathLike[str],
    mesh: ParallelMesh,
    dtype: torch.dtype | None,
    stem: str,
) -> tuple[PreTrainedModel, dict[str, Any], Callable[[], LoadReport]]:
    """A model split over ``mesh.tp`` on the meta device, what ranks compare of it, and what reads this rank's slices.

    Args:
        dtype: of the weights; those that transformers keeps in float32 stay so. None: the config's.
        stem: what the names of the weight files begin with.

    Raises:
        CheckpointError: there is no config, or none that transformers knows; a tensor is missing or of another shape.
        UnsupportedError: quantized weights, or a model that can't be split exactly.
    """
    model = loading.build(path, model_class, dtype)
    _keep_in_float32(model)
    whole, sources = facts(model), Sources(model)
    make(weight_changes(model, mesh))
    with Checkpoint(path, stem) as checkpoint:
        check(model, checkpoint, sources.find(checkpoint))

    def read() -> LoadReport:
        *_, report = loading.load(model, path, mesh, sources, stem=stem, packs=False)
        assert isinstance(report, LoadReport)
        return report

    return model, whole, read


def _keep_in_float32(model: PreTrainedModel) -> None:
    """Declare as float32 what transformers loads as float32 into a model of a half type."""
    kept: set[str] = set()
    if model.dtype in (torch.float16, torch.bfloat16):
        kept.update(model._keep_in_fp32_modules_strict or ())
    if model.dtype == torch.float16:
        kept.update(model._keep_in_fp32_modules or ())
    for name, module in model.named_modules():
        if kept & set(name.split(".")):
            module.to(torch.float32)
