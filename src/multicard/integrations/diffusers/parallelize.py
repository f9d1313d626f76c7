"""``mc.parallelize`` for a diffusers model or pipeline."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

from multicard.errors import ConfigError
from multicard.integrations.adapters import follow_adapters
from multicard.integrations.diffusers.checks import check_caches, check_guidance, check_sequence, check_uncompiled
from multicard.integrations.diffusers.denoisers import denoisers
from multicard.integrations.diffusers.doors import open_model, open_pipeline
from multicard.integrations.diffusers.families import BATCH
from multicard.integrations.diffusers.lora import follow_loaders
from multicard.integrations.diffusers.plans import sequence_plan
from multicard.integrations.diffusers.sequence import SequenceSplit, shares_sequence
from multicard.integrations.diffusers.tensor import is_split, tensor_changes
from multicard.integrations.seams import facts
from multicard.integrations.styles import Change, make
from multicard.mesh import ParallelMesh
from multicard.replica import Replica

PLAN_KEYS = ("batch", "sequence", "tensor")


def parallelize(target: Any, mesh: ParallelMesh, plan: Mapping[str, Any] | None = None) -> Any:
    """Split a pipeline, or a single denoiser, over ``mesh`` in place, and return it.

    Denoisers are split; text encoders and autoencoders stay whole, and every rank computes the same with them.

    Args:
        target: a pipeline or a model.
        mesh: cfg splits guidance branches (for a single model: its batch), ring and ulysses split image tokens, tp
            splits weights; dp changes nothing.
        plan: replaces ours: any of ``{"batch": BatchPlan, "sequence": SequencePlan, "tensor": {pattern: style}}``.

    Raises:
        ConfigError: the plan doesn't fit the model.
        UnsupportedError: a denoiser has no plan for the mesh's axes, or has a cache; before anything is changed.
        MismatchError: ranks have different denoisers.
    """
    plan = plan or {}
    if unknown := set(plan) - set(PLAN_KEYS):
        raise ConfigError(f"plan: unknown part {', '.join(sorted(unknown))}: must be {', '.join(PLAN_KEYS)}")
    models = {"": target} if isinstance(target, nn.Module) else denoisers(target)
    whole = {name: facts(model) for name, model in models.items() if not is_split(model)}
    Replica(mesh).compare("mc.parallelize", whole)
    for name, model in models.items():
        check_caches(name or type(model).__name__, model, mesh)
    changes: list[Change] = []
    if mesh.tp.size > 1:
        for model in (model for model in models.values() if not is_split(model)):
            check_uncompiled(model)
            changes += tensor_changes(model, mesh.tp, plan.get("tensor"))
    if mesh.sequence.size > 1:
        check_guidance(target)
        for model in (model for model in models.values() if not shares_sequence(model, mesh)):
            check_uncompiled(model)
            sequence = plan.get("sequence") or sequence_plan(model)
            check_sequence(model, sequence)
            changes.append(functools.partial(SequenceSplit, model, mesh, sequence))
    if mesh.tp.size > 1:
        follow_adapters()
        follow_loaders()
    make(changes)
    if mesh.cfg.size * mesh.sequence.size * mesh.tp.size > 1:
        door = open_model if isinstance(target, nn.Module) else open_pipeline
        door(target, mesh, plan.get("batch", BATCH))
    return target
