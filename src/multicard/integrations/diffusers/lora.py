"""LoRA of diffusers' pipelines, from files, by diffusers' loaders; Flux's asks for whole shapes of split layers."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from torch import nn

from multicard.errors import CheckpointError, UnsupportedError
from multicard.extras import has, need
from multicard.integrations.adapters import base_of
from multicard.integrations.intercept import PLAIN
from multicard.integrations.untrusted import blamed_on, offline
from multicard.layers import ColumnParallelLinear, RowParallelLinear
from multicard.weights.checkpoint import read_header

FILE = "pytorch_lora_weights.safetensors"
"""The name that diffusers gives a LoRA's file."""


def lora_file(path: pathlib.Path) -> pathlib.Path:
    """The safetensors file of a LoRA: ``path`` itself, or the one in this folder. Reads its header.

    Raises:
        CheckpointError: there is none, or several; it is truncated or damaged, or holds no LoRA.
        UnsupportedError: it is pickled.
    """
    need("peft", "a LoRA of diffusers")
    file = path
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        named = [file for file in found if file.name == FILE] or found
        if len(named) != 1:
            raise CheckpointError(f"{path}: {len(named)} safetensors files in it; name the LoRA's file")
        file = named[0]
    elif path.suffix != ".safetensors":
        raise UnsupportedError(f"{path}: a LoRA is read from a safetensors file, or from a folder with one")
    if not any(".lora" in entry.name or "lora_" in entry.name for entry in read_header(file)):
        raise CheckpointError(f"{file}: no tensor in it is a LoRA's")
    return file


def load_lora(pipe: Any, files: Sequence[pathlib.Path]) -> None:
    """Give ``pipe`` the LoRAs of these files, all active with full weight.

    Raises:
        CheckpointError: diffusers can't load one, or it has nothing for this pipeline.
        UnsupportedError: the pipeline has no loader for LoRA.
    """
    if not files:
        return
    if not hasattr(pipe, "load_lora_weights"):
        raise UnsupportedError(f"{type(pipe).__name__} has no load_lora_weights in this diffusers: use no lora=")
    names = [f"lora_{number}" for number in range(len(files))]
    for name, file in zip(names, files, strict=True):
        with offline(), blamed_on(f"{file}: {type(pipe).__name__} can't load it; a LoRA of another model?"):
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name, local_files_only=True)
        if not any(name in adapters for adapters in pipe.get_list_adapters().values()):
            raise CheckpointError(f"{file}: nothing in it is for {type(pipe).__name__}; a LoRA of another model?")
    pipe.set_adapters(names)


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
