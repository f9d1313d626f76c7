"""``transformers`` models split over a mesh in place; ``generate()`` and the modelling code aren't changed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from multicard.extras import need
from multicard.integrations.adapters import follow_adapters
from multicard.integrations.seams import Hooks, facts
from multicard.integrations.styles import make
from multicard.integrations.transformers import load as loading
from multicard.integrations.transformers.doors import open_door
from multicard.integrations.transformers.generate import guard
from multicard.integrations.transformers.sources import Sources
from multicard.integrations.transformers.tensor import tensor_changes
from multicard.layers.packed import packer
from multicard.mesh import ParallelMesh
from multicard.replica import Replica
from multicard.weights import LoadReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from multicard.integrations.transformers.sequence import Sequence


def parallelize(model: PreTrainedModel, mesh: ParallelMesh, plan: Mapping[str, str] | None = None) -> PreTrainedModel:
    """Split ``model`` over ``mesh`` in place, and return it. Every rank must call it on the same model.

    Args:
        model: any ``transformers`` model with its own plan or one of ours; a model on the meta device stays there.
        mesh: its tp axis splits weights; ring and ulysses split the prompt and the cache.
        plan: ``{pattern: style}`` instead of ours, with the styles of ``styles.STYLES``.

    Raises:
        ConfigError: the plan doesn't fit the model.
        UnsupportedError: the model can't be split exactly; the message names the module and why.
        MismatchError: ranks have different models.
    """
    Replica(mesh).compare("mc.parallelize", facts(model))
    opened = _split(model, mesh, plan)
    if model.device.type != "meta":
        nn.Module.to(model, mesh.device)
    pack = packer(model)
    for module in model.modules():
        pack(module)
    finish(model, mesh, *opened)
    return model


def _split(model: PreTrainedModel, mesh: ParallelMesh, plan: Mapping[str, str] | None) -> tuple[Hooks, Sequence | None]:
    """Split weights over tp, the sequence over ring and ulysses; refuse, if necessary, before anything is changed."""
    hooks, split = Hooks("transformers"), None
    if mesh.sequence.size > 1:
        from multicard.integrations.transformers import sequence

        sequence.check(model, mesh)
    found = tensor_changes(model, mesh.tp, hooks, plan)
    if mesh.sequence.size > 1:
        split = sequence.attach(model, mesh, hooks)
    if mesh.tp.size > 1:
        follow_adapters()
    make(found)
    return hooks, split


def finish(model: PreTrainedModel, mesh: ParallelMesh, hooks: Hooks, sequence: Sequence | None) -> None:
    """Guard the methods of a split model, and put a door on its calls."""
    guard(model, mesh)
    if mesh.tp.size * mesh.sequence.size > 1:
        open_door(model, mesh, hooks, sequence)
    model.requires_grad_(False).eval()


def from_pretrained(
    path: str | os.PathLike[str],
    mesh: ParallelMesh,
    *,
    model_class: type[PreTrainedModel] | None = None,
    dtype: torch.dtype | str | None = None,
    plan: Mapping[str, str] | None = None,
    **overrides: Any,
) -> PreTrainedModel:
    """A ``transformers`` checkpoint as a model split over ``mesh``; every rank reads only its own slices.

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
    *_, done = load_model(path, mesh, model_class, dtype, plan, **overrides)
    assert isinstance(done, tuple)
    return done[0]


def load_model(
    path: str | os.PathLike[str],
    mesh: ParallelMesh,
    model_class: type[PreTrainedModel] | None = None,
    dtype: torch.dtype | str | None = None,
    plan: Mapping[str, str] | None = None,
    checksums: bool = False,
    **overrides: Any,
) -> Iterator[float | tuple[PreTrainedModel, LoadReport]]:
    """:func:`from_pretrained` as a generator: the share done, from 0 to 1, then the model and what the loading took."""
    need("transformers", "mc.from_pretrained")
    model = loading.build(path, model_class, dtype, **overrides)
    Replica(mesh).compare("mc.from_pretrained", facts(model))
    sources = Sources(model)
    opened = _split(model, mesh, plan)
    for done in loading.load(model, path, mesh, sources, checksums):
        if isinstance(done, LoadReport):
            finish(model, mesh, *opened)
            yield model, done
        else:
            yield done
