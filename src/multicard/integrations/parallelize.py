"""``mc.parallelize``: the entry to the adapters."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from torch import nn

from multicard.errors import ConfigError, UnsupportedError
from multicard.integrations.adapters import inside
from multicard.mesh import ParallelMesh

Target = TypeVar("Target")

ADAPTERS = ("diffusers", "transformers")
"""Libraries with an adapter of the same name; a model belongs to the first that defines one of its base classes."""


def parallelize(
    model: Target,
    mesh: ParallelMesh,
    plan: Mapping[str, Any] | None = None,
    parts: Collection[str] | None = None,
) -> Target:
    """Split a model or a pipeline of another library over ``mesh``, in place, and return it.

    Collective: every rank must call it, on the same model. Afterwards the model is used as before.

    Args:
        model: a ``transformers`` model, peft's ``PeftModel`` around one, a ``diffusers`` model or pipeline; or, with a
            mesh of dp and cfg alone, any ``nn.Module`` that is called like a denoiser.
        mesh: its axes with more than one rank determine what is split.
        plan: replaces the model's own plan or ours; the pages about the two libraries describe its format.
        parts: of a ``diffusers`` pipeline, those to split, of "denoiser", "text" and "vae"; None: all that can be.

    Raises:
        ConfigError: the plan doesn't fit the model, or unknown parts.
        UnsupportedError: the model can't be split exactly in this way; the message says why.
    """
    if parts is not None and isinstance(model, nn.Module):
        raise ConfigError(f"parts={parts!r}: {type(model).__name__} is a model, and only pipelines have parts")
    given: dict[str, Any] = {} if parts is None else {"parts": parts}
    if (adapted := inside(model)) is not model:
        parallelize(adapted, mesh, plan)
        return model
    for library in ADAPTERS:
        if any(base.__module__.partition(".")[0] == library for base in type(model).__mro__):
            adapter = importlib.import_module(f"multicard.integrations.{library}")
            return adapter.parallelize(model, mesh, plan, **given)
    if isinstance(model, nn.Module) and mesh.tp.size == mesh.sequence.size == 1:
        return importlib.import_module("multicard.integrations.diffusers").parallelize(model, mesh, plan)
    raise UnsupportedError(
        f"{type(model).__name__} isn't a transformers or diffusers model: only cfg and dp work on other modules. "
        "Build it from multicard's layers and mc.attend instead"
    )
