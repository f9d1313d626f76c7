"""``from_pretrained``: loads a ``transformers`` checkpoint; every rank reads only its own slices.

The model is built and split on the meta device; each parameter's shard rule then says which bytes to read. If a
checkpoint's layout differs from the model's, it is converted by ``transformers``' own rules. Renamed tensors, and
packed experts made from single ones, are read by slices; for any other conversion the tensors are read whole, one group
at a time.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from multicard import weights
from multicard.errors import CheckpointError, ConfigError, UnsupportedError
from multicard.integrations.transformers.sources import Sources, internal
from multicard.integrations.untrusted import blamed_on, choose_implementations, offline, read_config
from multicard.layers.packed import packer
from multicard.mesh import ParallelMesh
from multicard.weights import LoadReport

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def build(
    path: str | os.PathLike[str],
    model_class: type[PreTrainedModel] | None,
    dtype: torch.dtype | str | None,
    **overrides: Any,
) -> PreTrainedModel:
    """The model of a checkpoint's config on the meta device; ``overrides`` change the config.

    Raises:
        CheckpointError: there is no config, or none that transformers knows.
        ConfigError: an override that the config doesn't have.
        UnsupportedError: quantized weights, or a class that must be given as ``model_class``.
    """
    from transformers import AutoConfig, GenerationConfig

    if weights.is_gguf(path):
        raise UnsupportedError(f"from_pretrained: {path} is a GGUF file, which mc.LLM runs; give a folder here")
    if not (pathlib.Path(path) / "config.json").is_file():
        raise CheckpointError(f"{path}: no config.json there; download a checkpoint first with `hf download NAME`")
    read_config(pathlib.Path(path))
    with offline(), blamed_on(f"{path}/config.json: transformers doesn't know this model"):
        config, unknown = AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, return_unused_kwargs=True, **overrides
        )
    if unknown:
        raise ConfigError(
            f"from_pretrained: {', '.join(sorted(unknown))}: neither a setting of {type(config).__name__} nor an "
            "argument of ours (model_class, dtype, plan); the mesh determines where weights are placed"
        )
    if getattr(config, "quantization_config", None):
        raise UnsupportedError(
            f"{path} holds quantized weights, which can't be split: use an unquantized checkpoint, or mc.LLM for the "
            "models that its own decoder runs (Llama, Mistral, Qwen2, Qwen3)"
        )
    if dtype == "auto":  # transformers' name for the config's dtype
        dtype = None
    choose_implementations(config, overrides)
    kind = _model_class(config, model_class)
    with offline(), blamed_on(f"{path}/config.json: transformers makes no model of it"), torch.device("meta"):
        model = kind._from_config(config, dtype=dtype or config.dtype or torch.float32)
    if model.can_generate() and (pathlib.Path(path) / "generation_config.json").is_file():
        with offline(), blamed_on(f"{path}/generation_config.json: transformers can't use it"):
            model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model


def _model_class(config: PreTrainedConfig, model_class: type[PreTrainedModel] | None) -> type[PreTrainedModel]:
    import transformers

    if model_class is not None:
        return model_class
    named = config.architectures[0] if isinstance(config.architectures, list) and config.architectures else None
    found = getattr(transformers, named, None) if isinstance(named, str) else None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    raise UnsupportedError(
        f"{config.name_or_path}/config.json says architectures={config.architectures}, which this transformers doesn't "
        "have: pass model_class="
    )


def load(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    mesh: ParallelMesh,
    sources: Sources,
    checksums: bool = False,
    stem: str = "model",
    packs: bool = True,
) -> Iterator[float | LoadReport]:
    """Read this rank's part of every parameter of a split model, and compute its buffers: :func:`weights.load`.

    Args:
        sources: made before the model was split.
        checksums: first compare the files with the folder's SHA256SUMS; the files are divided over the ranks.
        stem: what the names of the weight files begin with.
        packs: reorder weights for the CPU's matrix kernel; they can't be moved or cast then.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or damaged; the same on every rank.
    """
    finish = packer(model) if packs else None
    for done in weights.load(
        model, path, mesh.world, mesh.device, sources.find, stem=stem, checksums=checksums, finish=finish
    ):
        if isinstance(done, LoadReport):
            _compute_buffers(model, mesh.device)
        yield done


def _compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute buffers that no checkpoint holds (rotary frequencies), as transformers does; nothing else changes."""
    nothing: Any = set()
    move = internal(model, "_move_missing_keys_from_meta_to_device")
    move(nothing, {"": device}, None, None)  # no parameter is missing, but buffers are on the meta device
    temporary = {name for name, _ in model.named_non_persistent_buffers()}
    persistent = [buffer for name, buffer in model.named_buffers() if name not in temporary]
    for tensor in (*model.parameters(), *persistent):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    model.initialize_weights()
