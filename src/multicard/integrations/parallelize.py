"""``mc.parallelize``: the one door to the adapters."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from multicard.errors import UnsupportedError
from multicard.mesh import ParallelMesh

Target = TypeVar("Target")

ADAPTERS = ("diffusers", "transformers")
"""Libraries that an adapter of the same name knows, in the order in which a class's bases are looked up."""


def parallelize(model: Target, mesh: ParallelMesh, plan: Mapping[str, Any] | None = None) -> Target:
    """Split a model or a pipeline of another library over ``mesh``, in place, and return it.

    Collective: every rank must call it, on the same model. Afterwards it is used as before.

    Args:
        model: a ``transformers`` model, a ``diffusers`` model or pipeline; with a mesh of dp and cfg alone any
            ``nn.Module`` that is called as a denoiser.
        mesh: which axes have more than one rank says what is split.
        plan: how, instead of the model's own plan or ours; the adapters' pages say what it looks like.

    Raises:
        ConfigError: the plan doesn't fit the model.
        UnsupportedError: it can't be split exactly this way; the message says what is missing.
    """
    for library in ADAPTERS:
        if any(base.__module__.partition(".")[0] == library for base in type(model).__mro__):
            adapter = importlib.import_module(f"multicard.integrations.{library}")
            return adapter.parallelize(model, mesh, plan)
    if isinstance(model, nn.Module) and mesh.tp.size == mesh.sequence.size == 1:
        return importlib.import_module("multicard.integrations.diffusers").parallelize(model, mesh, plan)
    raise UnsupportedError(
        f"{type(model).__name__} isn't a transformers or diffusers model: only cfg and dp work on other modules. "
        "Build it from multicard's layers and mc.attend instead"
    )
