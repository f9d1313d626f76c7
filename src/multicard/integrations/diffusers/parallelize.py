"""``mc.parallelize`` for a diffusers model or pipeline."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from multicard.errors import ConfigError
from multicard.integrations.adapters import follow_adapters
from multicard.integrations.diffusers.caches import check_caches, enable_again
from multicard.integrations.diffusers.checks import (
    check_guidance,
    check_maps,
    check_rows,
    check_sequence,
    check_uncompiled,
)
from multicard.integrations.diffusers.denoisers import denoisers
from multicard.integrations.diffusers.doors import open_model, open_pipeline
from multicard.integrations.diffusers.families import BATCH
from multicard.integrations.diffusers.lora import follow_loaders
from multicard.integrations.diffusers.parts import beside, check_parts, part_changes
from multicard.integrations.diffusers.plans import sequence_plan
from multicard.integrations.diffusers.reports import note_report
from multicard.integrations.diffusers.rows import (
    RowSplit,
    autoencoder_changes,
    beside_unets,
    has_rows,
    is_autoencoder,
    split_by_rows,
)
from multicard.integrations.diffusers.sequence import SequenceSplit, shares_sequence
from multicard.integrations.diffusers.tensor import is_split, tensor_changes
from multicard.integrations.seams import facts
from multicard.integrations.styles import Change, make
from multicard.mesh import ParallelMesh
from multicard.replica import Replica

PLAN_KEYS = ("batch", "sequence", "tensor")


def parallelize(
    target: Any,
    mesh: ParallelMesh,
    plan: Mapping[str, Any] | None = None,
    parts: Collection[str] | None = None,
) -> Any:
    """Split a pipeline, or a single denoiser, over ``mesh`` in place, and return it.

    Text encoders are split by weights and autoencoders by rows of pictures, over all ranks of a replica; one that can't
    be stays whole, and ``report`` says why.

    Args:
        target: a pipeline, a denoiser or an autoencoder.
        mesh: for denoisers, cfg splits guidance branches (for a single model: its batch), ring and ulysses split image
            tokens (of a U-Net: rows), tp splits weights; dp changes nothing.
        plan: replaces ours: any of ``{"batch": BatchPlan, "sequence": SequencePlan, "tensor": {pattern: style}}``.
        parts: of a pipeline, those to split, of "denoiser", "text" and "vae"; None: all that can be split.

    Raises:
        ConfigError: the plan doesn't fit the model, or unknown parts.
        UnsupportedError: a denoiser has no plan for the mesh's axes, or has a cache; a part that was named can't be
            split; before anything is changed.
        MismatchError: ranks have different models.
    """
    plan, wanted = plan or {}, check_parts(parts)
    if unknown := set(plan) - set(PLAN_KEYS):
        raise ConfigError(f"plan: unknown part {', '.join(sorted(unknown))}: must be {', '.join(PLAN_KEYS)}")
    if isinstance(target, nn.Module) and is_autoencoder(target):
        return _parallelize_autoencoder(target, mesh)
    if isinstance(target, nn.Module):
        models, others = {"": target}, {}
    else:
        models = denoisers(target) if "denoiser" in wanted else {}
        others = beside(target, wanted) if mesh.replica.size > 1 else {}
    whole = {name: model for name, model in models.items() if not is_split(model)} | others
    Replica(mesh).compare("mc.parallelize", {name: facts(model) for name, model in whole.items()})
    changes = _denoiser_changes(target, models, mesh, plan)
    added, refused = part_changes(others, mesh, named=parts is not None)
    if mesh.replica.size > 1:
        follow_adapters()
    if mesh.tp.size > 1:
        follow_loaders()
    make([*changes, *added])
    if mesh.replica.size > 1:
        door = open_model if isinstance(target, nn.Module) else open_pipeline
        door(target, mesh if models else mesh.by_weights(), plan.get("batch", BATCH))
    if not isinstance(target, nn.Module):
        note_report(target, mesh, wanted, refused)
    return target


def _parallelize_autoencoder(model: nn.Module, mesh: ParallelMesh) -> nn.Module:
    """Split an autoencoder by itself."""
    Replica(mesh).compare("mc.parallelize", facts(model))
    if mesh.replica.size > 1 and split_by_rows(model) is None:
        make(autoencoder_changes(model, mesh))
    return model


def _denoiser_changes(
    target: Any, models: Mapping[str, nn.Module], mesh: ParallelMesh, plan: Mapping[str, Any]
) -> list[Change]:
    """The changes that split denoisers: checked, not made yet."""
    for name, model in models.items():
        check_caches(name or type(model).__name__, model, mesh, by_rows=has_rows(model))
    changes: list[Change] = []
    if mesh.tp.size > 1:
        check_maps(target)
        for model in (model for model in models.values() if not is_split(model)):
            check_uncompiled(model)
            changes += [*tensor_changes(model, mesh.tp, plan.get("tensor")), enable_again(model)]
    if mesh.sequence.size > 1:
        if models:
            check_guidance(target)
        nets = beside_unets(target) if models and not isinstance(target, nn.Module) else []
        for model in (model for model in (*models.values(), *nets) if not shares_sequence(model, mesh)):
            if has_rows(model) and not plan.get("sequence"):
                check_rows(type(model).__name__, model, model.modules())
                changes.append(functools.partial(RowSplit, model, mesh))
                continue
            check_uncompiled(model)
            sequence = plan.get("sequence") or sequence_plan(model)
            check_sequence(model, sequence)
            changes.append(functools.partial(SequenceSplit, model, mesh, sequence))
    return changes
