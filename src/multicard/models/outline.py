"""A decoder as a checkpoint describes it, before any of its weights are read."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable

import torch

from multicard.axis import Axis
from multicard.config import ParallelConfig
from multicard.errors import CheckpointError
from multicard.layers.shard import shard_of
from multicard.mesh import ParallelMesh, single
from multicard.models.config import DecoderConfig
from multicard.models.decoder import ParallelTransformer
from multicard.models.gguf.config import config_of, is_interleaved
from multicard.models.gguf.names import ROPE_FACTORS, Named, key_of
from multicard.quantized.weight import blocks_of
from multicard.weights import Plain, SourceOf, TensorFiles, is_gguf
from multicard.weights.blocks import hold_in_blocks, in_blocks
from multicard.weights.gguf.files import GGUFFiles


def outline(config: DecoderConfig, degrees: ParallelConfig, dtype: torch.dtype | None = None) -> ParallelTransformer:
    """The first rank's part of the model without memory, for its shapes. Raises ConfigError as the model does."""
    mesh = dataclasses.replace(single(), tp=Axis("tp", 0, degrees.tp))
    return ParallelTransformer(config, mesh, dtype, device="meta")


def describe(path: str | os.PathLike[str]) -> DecoderConfig:
    """The config of a checkpoint's folder or of a GGUF file. Raises CheckpointError or UnsupportedError."""
    if is_gguf(path):
        with GGUFFiles(path) as files:
            return config_of(files)
    folder = pathlib.Path(path)
    if not (folder / "config.json").exists() and any(folder.glob("*.gguf")):
        raise CheckpointError(f"{folder} has no config.json, but GGUF files: give the path of one")
    return DecoderConfig.from_folder(folder)


def declare(path: str | os.PathLike[str], mesh: ParallelMesh, dtype: torch.dtype | None = None) -> ParallelTransformer:
    """This rank's part of the decoder at ``path``, on "meta": what a file has in blocks is declared in blocks.

    Raises as :func:`describe`, and ConfigError for degrees that don't fit.
    """
    model = ParallelTransformer(describe(path), mesh, dtype, device="meta")
    if is_gguf(path):
        with GGUFFiles(path) as files:
            hold_in_blocks(model, files, gguf_sources(model.config, files), model.dtype)
    return model


def sources(config: DecoderConfig, files: TensorFiles, model: ParallelTransformer | None = None) -> SourceOf:
    """The source of each of our parameters: in a GGUF file, or in a Hugging Face causal-LM checkpoint.

    Args:
        model: of which some may be declared in blocks; None: none are.
    """
    if not isinstance(files, GGUFFiles):
        return lambda name: Plain(name if name.startswith("lm_head.") else f"model.{name}")
    plain, found = gguf_sources(config, files), {}
    for name, parameter in model.named_parameters(remove_duplicate=False) if model is not None else ():
        if (weight := blocks_of(parameter)) is not None:
            found[name] = in_blocks(files, plain(name), shard_of(parameter), weight.dtype)
    return lambda name: found.get(name) or plain(name)


def gguf_sources(config: DecoderConfig, files: GGUFFiles) -> Callable[[str], Named]:
    """The tensors of each of our parameters in a GGUF file."""
    pairs_of = config.head_dim if is_interleaved(files) else None
    return lambda name: Named(key_of(name), pairs_of)


def is_ignored(config: DecoderConfig, name: str) -> bool:
    """Whether a checkpoint's tensor is unused: rotary tables, and the copy of a tied head."""
    if name.endswith("rotary_emb.inv_freq") or name == ROPE_FACTORS:
        return True
    return config.tied_head and name == "lm_head.weight"
