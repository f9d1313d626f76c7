"""peft's adapters in a model: what they are on, and whether a split layer can have them. Imports nothing of peft.

``lora`` has the split form of those that can be split.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from multicard.errors import UnsupportedError
from multicard.extras import has

WITHIN = ("base_layer.", "original_module.")
"""What an adapter is around."""
STATE = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
"""The attributes that say what an adapter does."""
FIX = "merge them (merge_and_unload() or fuse_lora()) or unload them first, or use ulysses, ring or cfg instead of tp"


def is_adapter(module: nn.Module) -> bool:
    """Whether it is peft's, around a layer of the model."""
    inside = hasattr(module, "base_layer") or hasattr(module, "original_module")
    return inside and any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__)


def base_of(module: nn.Module) -> nn.Module:
    """The layer inside an adapter; any other module itself."""
    base = getattr(module, "base_layer", module) if is_adapter(module) else module
    assert isinstance(base, nn.Module)
    return base


def check_adapter(module: nn.Module, path: str) -> None:
    """Refuse adapters on a layer that is to be split unless they are plain LoRA.

    Raises:
        UnsupportedError: names the adapter and what is particular about it.
    """
    if type(module).__name__ != "Linear" or not hasattr(module, "lora_A"):
        raise UnsupportedError(f"{path} has an adapter of peft's {_kind(module)}, which isn't a plain LoRA: {FIX}")
    if is_adapter(base_of(module)):
        raise UnsupportedError(f"{path} has adapters of two kinds around each other, which tp can't split: {FIX}")
    if "forward" in vars(module):
        raise UnsupportedError(f"{path} has a LoRA with a forward of its own (X-LoRA?), which tp can't split: {FIX}")
    variants: Any = module.lora_variant
    for name, variant in variants.items():
        kind = type(variant).__name__.removesuffix("LinearVariant")
        raise UnsupportedError(f"{path}: adapter {name!r} is a LoRA of the variant {kind}, which tp can't split: {FIX}")


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__.removeprefix('peft.').removeprefix('tuners.')}.{type(module).__name__}"


def inside(model: Any) -> Any:
    """The model of another library inside peft's ``PeftModel``; any other object itself.

    Raises:
        UnsupportedError: its adapters aren't in the model's layers but before its inputs (prompts, prefixes).
    """
    if type(model).__module__.partition(".")[0] != "peft" or not isinstance(model, nn.Module):
        return model
    configs: Any = getattr(model, "peft_config", {})
    for name, config in configs.items():
        if getattr(config, "is_prompt_learning", False):
            raise UnsupportedError(
                f"adapter {name!r} is of peft's type {config.peft_type.value}, which puts tokens or a cache before the "
                "input: only adapters inside layers can be on a split model"
            )
    base: Any = getattr(model, "base_model", model)  # of a PeftModel: peft's tuner
    base = getattr(base, "model", base)
    return base if isinstance(base, nn.Module) else model


def follow_adapters() -> None:
    """From now on peft, if it is installed, puts adapters on split layers in their split form (``lora.follow``)."""
    if has("peft"):
        importlib.import_module("multicard.integrations.lora").follow()


class AdapterState:
    """What ranks compare of a model's adapters, at each call: which are active, how strong, and (once) their weights.

    Args:
        model: the model that peft's adapters may be added to at any time.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: Any = None
        self._layers: list[Any] = []

    def facts(self) -> dict[str, Any]:
        """By name; empty for a model without adapters."""
        configs: Any = getattr(self._model, "peft_config", None)
        if not configs:
            self._known = None
            return {}
        found: dict[str, Any] = {}
        if self._known != (known := {name: id(config) for name, config in configs.items()}):
            self._layers = [module for module in self._model.modules() if is_adapter(module)]
            found["adapters' weights"] = [
                parameter
                for layer in self._layers
                for name, parameter in layer.named_parameters()
                if not name.startswith(WITHIN)
            ]
            self._known = known
        states = [[getattr(layer, name, None) for name in STATE] for layer in self._layers]
        return {**found, "adapters": str(states)}
