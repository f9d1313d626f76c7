"""A decoder's config from the metadata of a GGUF file; what would change its numbers and isn't known is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from multicard.errors import CheckpointError, UnsupportedError
from multicard.models.config import DecoderConfig, RopeConfig, naming
from multicard.models.gguf.names import ROPE_FACTORS
from multicard.models.gguf.vocabulary import read_vocabulary
from multicard.quantized.words import Blocks
from multicard.weights.gguf.files import GGUFFiles

ARCHITECTURES: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {}, "qwen3": {"qk_norm": True}}
"""Those that the decoder implements (Mistral's files say llama), with what no key and no tensor tells."""

INTERLEAVED = ("llama",)
"""Architectures whose files have the rows of queries and keys in pairs to rotate."""

USED = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",
)
UNNEEDED = ("rope.scaling.original_context_length", "rope.scaling.finetuned")
"""What only scalings use that are refused."""


def config_of(files: GGUFFiles) -> DecoderConfig:
    """The config of an open file.

    Raises:
        CheckpointError: a key is missing, has a value of another kind, or contradicts a tensor.
        UnsupportedError: an architecture, rope type, key or tokenizer that isn't implemented.
    """
    with naming(str(files.where)):
        return _config(files)


def is_interleaved(files: GGUFFiles) -> bool:
    return files.metadata["general.architecture"] in INTERLEAVED


def _config(files: GGUFFiles) -> DecoderConfig:
    family = files.metadata["general.architecture"]
    if family not in ARCHITECTURES:
        raise UnsupportedError(
            f"general.architecture {family!r} isn't one of LLM's for GGUF ({', '.join(ARCHITECTURES)})"
        )
    if (kind := files.metadata.get("general.type", "model")) != "model":
        raise UnsupportedError(f"general.type {kind!r}: only whole models can be run")
    prefix = f"{family}."
    found = {key.removeprefix(prefix): value for key, value in files.metadata.items() if key.startswith(prefix)}
    heads, hidden = found["attention.head_count"], found["embedding_length"]
    head_dim = found.get("attention.key_length", hidden // heads)
    vocabulary = read_vocabulary(files.metadata)
    tokens = _shape(files, "token_embd.weight")[0]
    fixed = {
        "vocab_size": tokens,
        "rope.dimension_count": head_dim,
        "attention.value_length": head_dim,
        "attention.causal": True,
        "expert_count": 0,
        "expert_used_count": 0,
        "rope.scaling.attn_factor": 1.0,
    }
    _check_keys(found, fixed, prefix)
    if vocabulary is not None and len(vocabulary.tokens) != tokens:
        raise CheckpointError(f"{len(vocabulary.tokens)} tokens, and token_embd.weight has {tokens} rows")
    return DecoderConfig(
        family=family,
        vocab_size=tokens,
        hidden=hidden,
        intermediate=found["feed_forward_length"],
        layers=found["block_count"],
        heads=heads,
        kv_heads=found.get("attention.head_count_kv", heads),
        head_dim=head_dim,
        context=found["context_length"],
        norm_eps=_decimal(found["attention.layer_norm_rms_epsilon"]),
        rope=_rope(files, found, head_dim),
        qkv_bias="blk.0.attn_q.bias" in files.tensors,
        output_bias="blk.0.attn_output.bias" in files.tensors,
        mlp_bias="blk.0.ffn_up.bias" in files.tensors,
        tied_head="output.weight" not in files.tensors,
        window=found.get("attention.sliding_window") or None,
        eos=() if vocabulary is None else vocabulary.ends,
        dtype=_dtype(files),
        block=max(_unit(files, name) for name in files.tensors),
        **ARCHITECTURES[family],
    )


def _check_keys(found: dict[str, Any], fixed: dict[str, Any], prefix: str) -> None:
    for key, value in found.items():
        said = f"{prefix + key!r} is {value!r:.40}"
        if key in fixed and value != fixed[key]:
            raise UnsupportedError(f"{said}: the decoder has {fixed[key]!r} here only")
        if key not in (*USED, *UNNEEDED, *fixed):
            raise UnsupportedError(f"{said}: the decoder doesn't implement this")


def _rope(files: GGUFFiles, found: dict[str, Any], head_dim: int) -> RopeConfig:
    kind = found.get("rope.scaling.type", "linear")  # as in llama.cpp, a factor alone is linear
    if kind not in ("none", "linear"):
        raise UnsupportedError(f"rope.scaling.type {kind!r}: the decoder has none and linear")
    factor = found.get("rope.scaling.factor", found.get("rope.scale_linear")) or 1.0
    linear = kind == "linear" and factor != 1.0
    return RopeConfig(
        theta=_decimal(found.get("rope.freq_base", 10000.0)),
        kind="linear" if linear else "default",
        factor=_decimal(factor) if linear else 1.0,
        divisors=_divisors(files, head_dim) if ROPE_FACTORS in files.tensors else (),
    )


def _divisors(files: GGUFFiles, head_dim: int) -> tuple[float, ...]:
    shape = _shape(files, ROPE_FACTORS)
    if shape != (head_dim // 2,):
        raise CheckpointError(f"{ROPE_FACTORS} has shape {shape} where heads of {head_dim} ask for {(head_dim // 2,)}")
    out = torch.empty(shape)
    files.read(ROPE_FACTORS, 0, range(len(out)), out)
    return tuple(out.tolist())


def _shape(files: GGUFFiles, name: str) -> tuple[int, ...]:
    if name not in files.tensors:
        raise CheckpointError(f"no tensor {name!r}")
    return files.tensors[name].shape


def _dtype(files: GGUFFiles) -> torch.dtype:
    """bfloat16, the half type that loses no range, for half types; float32 where blocks or float32 are all there is."""
    kinds = {entry.kind.name for entry in files.tensors.values()}
    return torch.bfloat16 if kinds & {"F16", "BF16"} else torch.float32


def _unit(files: GGUFFiles, name: str) -> int:
    """Columns between which the MLP's last matrix can be cut without cutting a block or a word of blocks; else 1."""
    entry = files.tensors[name]
    if not name.endswith("ffn_down.weight") or not entry.quantized:
        return 1
    return entry.kind.columns * Blocks(entry.kind.name, 1, 2).runs[0].together


def _decimal(value: Any) -> float:
    """A number that was rounded to float32 when it was stored, as it was written before: 1e-05."""
    return float(str(np.float32(value)))
