"""A decoder as a checkpoint describes it, before any of its weights are read."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from multicard.axis import Axis
from multicard.config import ParallelConfig
from multicard.errors import CheckpointError
from multicard.layers.shard import Shard, shard_of
from multicard.mesh import ParallelMesh, single
from multicard.models.config import DecoderConfig
from multicard.models.decoder import ParallelTransformer
from multicard.models.gguf.config import config_of, is_interleaved
from multicard.models.gguf.names import ROPE_FACTORS, Named, key_of
from multicard.quantized.types import BLOCK_TYPES
from multicard.quantized.weight import BlockWeight, blocks_of
from multicard.weights import Checkpoint, Plain, Source, SourceOf, TensorFiles, is_gguf
from multicard.weights.blocks import Rounded, hold_in_blocks, in_blocks, rounded
from multicard.weights.gguf.files import GGUFFiles
from multicard.weights.packed import Packed, is_part, packed


class Kinds(NamedTuple):
    """The types of blocks for the matrices of layers, and for embedding and head."""

    layers: str
    ends: str


QUANTIZE = {"int8": Kinds("Q8_0", "Q8_0"), "int4": Kinds("Q4_1", "Q8_0")}
"""By what ``LLM(quantize=...)`` is given."""


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


def declare(
    path: str | os.PathLike[str], mesh: ParallelMesh, dtype: torch.dtype | None = None, quantize: str | None = None
) -> ParallelTransformer:
    """This rank's part of the decoder at ``path``, on "meta": what is or will be in blocks is declared in blocks.

    Args:
        quantize: for folders, how weights are rounded as they are read, a key of QUANTIZE.

    Raises as :func:`describe`, and ConfigError for degrees that don't fit.
    """
    config = describe(path)
    if quantize is not None:
        block = BLOCK_TYPES[QUANTIZE[quantize].layers].columns
        config = dataclasses.replace(config, quantize=quantize, block=block)
    model = ParallelTransformer(config, mesh, dtype, device="meta")
    if quantize is not None:
        kinds = QUANTIZE[quantize]
        hold_in_blocks(
            model,
            lambda name, shard: rounded(shard, kinds.layers if name.startswith("layers.") else kinds.ends, model.dtype),
        )
    elif config.scheme is not None:
        scheme = config.scheme
        with Checkpoint(path) as folder:
            hold_in_blocks(model, lambda name, shard: packed(folder, scheme, _plain(name), shard, model.dtype))
    elif is_gguf(path):
        with GGUFFiles(path) as files:
            plain = gguf_sources(config, files)

            def found(name: str, shard: Shard) -> BlockWeight | None:
                source = in_blocks(files, plain(name), shard, model.dtype)
                return None if source is None else source.weight

            hold_in_blocks(model, found)
    return model


def sources(config: DecoderConfig, files: TensorFiles, model: ParallelTransformer | None = None) -> SourceOf:
    """The source of each of our parameters: in a GGUF file, or in a Hugging Face causal-LM checkpoint.

    Args:
        model: of which some may be declared in blocks; None: none are.
    """
    held = in_blocks_of(model)
    if isinstance(files, Checkpoint) and config.scheme is not None:
        scheme = config.scheme
        weights = {name: weight for name, (_, weight) in held.items()}
        return lambda name: Packed(_plain(name), scheme, files, weights.get(name))
    if not isinstance(files, GGUFFiles):
        return _plain
    plain, found = gguf_sources(config, files), {}
    for name, (parameter, weight) in held.items():
        found[name] = in_blocks(files, plain(name), shard_of(parameter), weight.dtype)
    return lambda name: found.get(name) or plain(name)


def _plain(name: str) -> Plain:
    """The tensors of one of our parameters in a Hugging Face checkpoint."""
    return Plain(name if name.startswith("lm_head.") else f"model.{name}")


def rounding(source_of: SourceOf, model: ParallelTransformer) -> SourceOf:
    """The same sources, rounded to the blocks in which parameters of ``model`` are declared."""
    found = in_blocks_of(model)

    def source(name: str) -> Source | None:
        plain = source_of(name)
        return Rounded(plain, found[name][1]) if plain is not None and name in found else plain

    return source


def in_blocks_of(model: ParallelTransformer | None) -> dict[str, tuple[Tensor, BlockWeight]]:
    """Parameters that are declared in blocks, by name."""
    named = model.named_parameters(remove_duplicate=False) if model is not None else ()
    return {name: (each, weight) for name, each in named if (weight := blocks_of(each)) is not None}


def gguf_sources(config: DecoderConfig, files: GGUFFiles) -> Callable[[str], Named]:
    """The tensors of each of our parameters in a GGUF file."""
    pairs_of = config.head_dim if is_interleaved(files) else None
    return lambda name: Named(key_of(name), pairs_of)


def is_ignored(config: DecoderConfig, name: str, files: TensorFiles | None = None) -> bool:
    """Whether a checkpoint's tensor is unused: rotary tables, the copy of a tied head; or a part of a packed matrix.

    Args:
        files: in which unused biases have to be 0; None: they aren't looked at.
    """
    if name.endswith("rotary_emb.inv_freq") or name == ROPE_FACTORS:
        return True
    if config.tied_head and name.startswith("lm_head."):
        return name == "lm_head.weight"
    folder = files if isinstance(files, Checkpoint) else None
    return config.scheme is not None and is_part(config.scheme, name, folder)
