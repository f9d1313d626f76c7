"""What diffusers' own loading of LoRA needs besides peft's: Flux's loader asks for the whole shapes of layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from multicard.extras import has
from multicard.integrations.adapters import base_of
from multicard.integrations.intercept import PLAIN
from multicard.layers import ColumnParallelLinear, RowParallelLinear


def follow_loaders() -> None:
    """From now on Flux's loader compares a LoRA's shapes with a split layer's whole ones."""
    if not has("peft"):
        return
    from diffusers.loaders import FluxLoraLoaderMixin

    loader: Any = FluxLoraLoaderMixin
    plain = loader._calculate_module_shape
    if hasattr(plain, PLAIN):
        return

    def shape(
        model: nn.Module, base_module: nn.Module | None = None, base_weight_param_name: str | None = None
    ) -> tuple[int, ...]:
        path = (base_weight_param_name or "").removesuffix(".weight")
        layer = base_of(base_module or model.get_submodule(path))
        if isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            return layer.out_features, layer.in_features
        whole: tuple[int, ...] = plain(model, base_module, base_weight_param_name)
        return whole

    setattr(shape, PLAIN, plain)
    loader._calculate_module_shape = staticmethod(shape)
