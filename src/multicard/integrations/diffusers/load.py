"""Loading denoisers by slices: with tensor parallelism a rank reads only its own part of the weights."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from multicard import weights
from multicard.extras import has
from multicard.integrations.diffusers.tensor import tensor_changes
from multicard.integrations.styles import make
from multicard.mesh import ParallelMesh
from multicard.weights import Checkpoint, LoadReport
from multicard.weights.checkpoint import STORED_TYPES

STEM = "diffusion_pytorch_model"
HALF = (torch.float16, torch.bfloat16)


def load_slices(
    cls: type[Any], folder: pathlib.Path, mesh: ParallelMesh, dtype: torch.dtype | None = None
) -> tuple[nn.Module, LoadReport] | None:
    """A denoiser of class ``cls`` from its folder, with weights split over ``mesh.tp``, and the report.

    None if diffusers has to load it: without accelerate, if it is quantized, or if diffusers renames its tensors.

    Args:
        dtype: of the weights; modules that the class keeps in float32 stay so. None: float32, as diffusers loads them.

    Raises:
        CheckpointError: a file is truncated or can't be read on some rank; raised on every rank.
        UnsupportedError: no tensor plan for the class.
    """
    config = json.loads((folder / "config.json").read_text())
    whole = not any(folder.glob(f"{STEM}.safetensors*"))  # a variant's files
    if whole or not has("accelerate") or "quantization_config" in config:
        return None
    with Checkpoint(folder, STEM) as checkpoint:
        with _parameters_on_meta():
            model: nn.Module = cls.from_config(config).eval().requires_grad_(False)
        if set(checkpoint.tensors) != set(model.state_dict()) or any(
            entry.dtype not in STORED_TYPES for entry in checkpoint.tensors.values()
        ):
            return None
    _set_dtype(model, dtype or torch.float32)
    make(tensor_changes(model, mesh.tp))
    *_, report = weights.load(model, folder, mesh.world, mesh.device, stem=STEM)
    assert isinstance(report, LoadReport)
    return model, report


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Make modules with parameters on the meta device, but with computed buffers."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        yield


def _set_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    nn.Module.to(model, dtype)
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype in HALF else set()
    for name, module in model.named_modules():
        if kept & set(name.split(".")):
            nn.Module.to(module, torch.float32)
