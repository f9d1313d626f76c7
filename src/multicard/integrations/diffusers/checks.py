"""Features with which a ``diffusers`` model can't be split, refused before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from multicard.errors import ConfigError, UnsupportedError
from multicard.integrations.diffusers.denoisers import uncompiled
from multicard.integrations.diffusers.families import SequencePlan
from multicard.integrations.diffusers.plans import matching

TORCH_BACKENDS = ("native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math")
"""diffusers' attention backends that call torch's ``scaled_dot_product_attention``."""

MAPS = ("ledits_pp", "stable_diffusion_attend_and_excite")
"""Packages of diffusers.pipelines whose attention processors keep attention maps."""


def check_guidance(target: Any) -> None:
    """Refuse pipelines whose attention processors tell guidance branches apart (perturbed attention guidance).

    Raises:
        UnsupportedError: a processor attends to the sequence twice, in two ways.
    """
    if getattr(target, "_pag_attn_processors", None) is not None:
        name = type(target).__name__
        raise UnsupportedError(
            f"{name}: perturbed attention guidance attends to the sequence twice a layer, which ring and ulysses don't "
            f"cover; use cfg, tp or dp, or the pipeline without it ({name.replace('PAG', '')})"
        )


def check_maps(target: Any) -> None:
    """Refuse, under tp, pipelines that average attention maps over heads, of which each rank has only some.

    Raises:
        UnsupportedError: the pipeline is one of them.
    """
    if any(package in type(target).__module__.split(".") for package in MAPS):
        raise UnsupportedError(
            f"{type(target).__name__} averages attention maps over all heads, of which a rank has only some under tp; "
            "use cfg, ring, ulysses or dp"
        )


def check_sequence(model: nn.Module, plan: SequencePlan) -> None:
    """Refuse what the plan doesn't cover, before any forward.

    Raises:
        ConfigError: the plan names modules that the model doesn't have.
        UnsupportedError: a config value that the plan doesn't cover, or an attention backend that isn't torch's own.
    """
    for key, allowed in plan.refused.items():
        config = getattr(model, "config", {})
        if key in config and config[key] not in allowed:
            raise UnsupportedError(
                f"{type(model).__name__} with {key}={config[key]!r} can't be split by sequence: it treats some image "
                "tokens differently by their position; use cfg, tp or dp"
            )
    for pattern in plan.patterns:
        found = list(matching(model, pattern))
        if not found and "*" not in pattern:
            raise ConfigError(f"sequence plan: {type(model).__name__} has no module {pattern!r}")
    attentions = [item for pattern in plan.attention for item in matching(model, pattern)]
    if not attentions:
        raise ConfigError(f"sequence plan: none of {', '.join(plan.attention)} is in {type(model).__name__}")
    for path, module in attentions:
        backend = getattr(getattr(module, "processor", None), "_attention_backend", None)
        backend = getattr(backend, "value", backend)  # of diffusers' AttentionBackendName
        if backend is not None and backend not in TORCH_BACKENDS:
            raise UnsupportedError(
                f"{path} uses the attention backend {backend}: set_attention_backend('native') first"
            )


def check_uncompiled(model: nn.Module) -> None:
    """Refuse a compiled model: the compiled code wouldn't contain the changes."""
    if is_compiled(model):
        raise UnsupportedError(
            f"{type(uncompiled(model)).__name__} is compiled, and tp, ring and ulysses change it inside: parallelize, "
            "then compile; or use cfg"
        )


def check_rows(name: str, model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Refuse pictures whose rows are split in a network of which a part is compiled, before it is run or changed."""
    if any(map(is_compiled, modules)):
        path = next(path for path, module in model.named_modules() if is_compiled(module))
        raise UnsupportedError(
            f"torch.compile of {f'{name}.{path}'.strip('.')}: pictures whose rows are split over ranks can't be "
            "compiled; leave it uncompiled"
        )


def is_compiled(model: nn.Module) -> bool:
    return uncompiled(model) is not model or model._compiled_call_impl is not None
