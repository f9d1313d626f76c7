"""Loading components of a pipeline by slices: a rank reads only its own part of the weights."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from multicard import weights
from multicard.errors import ConfigError, UnsupportedError
from multicard.extras import has
from multicard.integrations.diffusers.tensor import tensor_changes
from multicard.integrations.seams import facts
from multicard.integrations.styles import make
from multicard.mesh import ParallelMesh
from multicard.weights import Checkpoint, LoadReport, Plain
from multicard.weights.checkpoint import STORED_TYPES

STEM = "diffusion_pytorch_model"
HALF = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Outline:
    """A component of a pipeline that can be read by slices.

    Attributes:
        model: split, on the meta device.
        facts: what ranks compare of it.
        read: reads this rank's slices into it. Collective.
    """

    model: nn.Module
    facts: dict[str, Any]
    read: Callable[[], LoadReport]


def outline_denoiser(
    cls: type[Any],
    folder: pathlib.Path,
    mesh: ParallelMesh,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
) -> Outline | None:
    """A denoiser of class ``cls`` from its folder, with weights split over ``mesh.tp``.

    None if diffusers has to load it: without accelerate, if it is quantized, or if diffusers renames its tensors.

    Args:
        dtype: of the weights; modules that the class keeps in float32 stay so. None: float32, as diffusers loads them.
        variant: which of several sets of weight files to read, if the folder has it.

    Raises:
        CheckpointError: a file is truncated or damaged, or a tensor has another shape.
        UnsupportedError: no tensor plan for the class.
    """
    config, stem = json.loads((folder / "config.json").read_text()), stem_of(folder, STEM, variant)
    if stem is None or not has("accelerate") or "quantization_config" in config:
        return None
    with Checkpoint(folder, stem) as checkpoint:
        with _parameters_on_meta():
            model: nn.Module = cls.from_config(config).eval().requires_grad_(False)
        if set(checkpoint.tensors) != set(model.state_dict()) or any(
            entry.dtype not in STORED_TYPES for entry in checkpoint.tensors.values()
        ):
            return None
        _set_dtype(model, dtype or torch.float32)
        whole = facts(model)
        make(tensor_changes(model, mesh.tp))
        weights.check(model, checkpoint, Plain)

    def read() -> LoadReport:
        *_, report = weights.load(model, folder, mesh.world, mesh.device, stem=stem)
        assert isinstance(report, LoadReport)
        return report

    return Outline(model, whole, read)


def outline_text(
    cls: type[Any],
    folder: pathlib.Path,
    mesh: ParallelMesh,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
) -> Outline | None:
    """A text encoder of class ``cls`` from its folder, with weights split over all ranks of a replica.

    None if transformers has to load it: if it is quantized or has no plan, or for want of plain safetensors files.

    Args:
        dtype: of the weights; None: the config's, as diffusers loads them.
        variant: which of several sets of weight files to read, if the folder has it.
    """
    from multicard.integrations.transformers.part import outline

    stem = stem_of(folder, "model", variant)
    if stem is None:
        return None
    try:
        return Outline(*outline(cls, folder, mesh.by_weights(), dtype, stem))
    except (ConfigError, UnsupportedError):
        return None


def stem_of(folder: pathlib.Path, stem: str, variant: str | None) -> str | None:
    """What the names of a component's weight files begin with: of the variant or, without one, the plain ones."""
    if variant is not None and (
        (folder / f"{stem}.{variant}.safetensors").is_file()
        or (folder / f"{stem}.safetensors.index.{variant}.json").is_file()
    ):
        return f"{stem}.{variant}"
    return stem if any((folder / f"{stem}.safetensors{end}").is_file() for end in ("", ".index.json")) else None


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
