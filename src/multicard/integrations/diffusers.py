"""``diffusers`` models and pipelines split over a mesh in place: the pipeline's code stays what it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from multicard.integrations.diffusers_guidance import guide_model, guide_pipeline
from multicard.integrations.diffusers_plans import BATCH
from multicard.mesh import ParallelMesh


def parallelize(target: Any, mesh: ParallelMesh, plan: Mapping[str, Any] | None = None) -> Any:
    """Split a pipeline, or a denoiser by itself, over ``mesh`` in place, and return it."""
    is_model = isinstance(target, nn.Module)
    if mesh.cfg.size > 1:
        if is_model:
            guide_model(target, mesh.cfg, BATCH)
        else:
            guide_pipeline(target, mesh.cfg, BATCH)
    return target
