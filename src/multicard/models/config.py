"""A decoder's config, read from a Hugging Face ``config.json``; unsupported features are refused by name."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from multicard.errors import CheckpointError, ConfigError, MulticardError, UnsupportedError
from multicard.values import is_whole
from multicard.weights.folder import FLOAT_TYPES, read_json
from multicard.weights.schemes.config import scheme_of
from multicard.weights.schemes.scheme import Scheme

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "qkv_bias": True},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "qk_norm": True},
}
"""Model types that the decoder implements, each with the defaults that differ from Llama's."""

ROPE_TYPES = ("default", "linear", "llama3")
LARGEST, MOST_LAYERS = 1 << 28, 1024  # above any real size; larger ones overflow or take minutes to allocate


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (arXiv 2104.09864).

    Attributes:
        theta: base of the frequencies.
        kind: "default", "linear" (positions ÷ ``factor``, arXiv 2306.15595) or "llama3" (low frequencies ÷ ``factor``,
            high ones kept, smooth in between).
        factor, low_freq_factor, high_freq_factor, original_context: of those kinds.
        divisors: of every pair's frequency, before all else; empty: none. How a GGUF file says "llama3".
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    divisors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "original_context"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"rope {name}={getattr(self, name)!r}: a finite number above 0")
        if not all(0 < each < math.inf for each in self.divisors):
            raise ConfigError("rope divisors: finite numbers above 0")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A pre-norm decoder with rotary positions, grouped-query attention and a gated MLP.

    Attributes:
        context: the most positions that the model supports.
        window: the sliding window in positions, if the checkpoint has one; longer requests are refused.
        eos: ids that end an answer.
        dtype: the checkpoint's.
        quantize: how weights are rounded as they are read, a key of ``outline.QUANTIZE``.
        block: intermediate features that stay together on a rank where that can be: those of a file's block.
        scheme: how the checkpoint has packed matrices; None: it has numbers, or is a GGUF file.
    """

    family: str
    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False
    window: int | None = None
    eos: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    quantize: str | None = None
    block: int = 1
    scheme: Scheme | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim", "context"):
            value, most = getattr(self, name), MOST_LAYERS if name == "layers" else LARGEST
            if not is_whole(value, 1, most):
                raise ConfigError(f"{name}={value!r}: a whole number from 1 to {most}")
        if self.heads * self.head_dim > LARGEST:
            raise ConfigError(f"{self.heads} heads of {self.head_dim}: their product must be at most {LARGEST}")
        if not 0 <= self.norm_eps < math.inf:
            raise ConfigError(f"norm_eps={self.norm_eps!r}: a finite number of 0 or more")
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.heads} attention heads over {self.kv_heads} key/value heads: must be a multiple")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim}: rotary positions rotate pairs, so it must be even")

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> DecoderConfig:
        """The config of a checkpoint folder.

        Raises:
            CheckpointError: no such folder, no ``config.json``, or one that isn't JSON or lacks a key.
            UnsupportedError: an architecture, rope type or feature that the decoder lacks.
        """
        raw = read_json(pathlib.Path(folder), "config.json")
        with naming(f"{folder}/config.json"):
            config = cls.from_dict(raw)
        generation = read_json(pathlib.Path(folder), "generation_config.json", optional=True)
        with naming(f"{folder}/generation_config.json"):
            eos = _ids(generation.get("eos_token_id"))
        return dataclasses.replace(config, eos=eos) if eos else config

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DecoderConfig:
        """The same from the content of ``config.json``, with the old or the new names of its keys."""
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise UnsupportedError(
                f"model_type {family!r} isn't one of LLM's ({', '.join(FAMILIES)}): use mc.parallelize on the "
                "transformers model"
            )
        stated = {**FAMILIES[family], **raw}  # null overrides a family's default: no window, as many kv heads as heads
        raw = {key: value for key, value in stated.items() if value is not None}
        _refuse(raw)
        heads, quantised = raw["num_attention_heads"], raw.get("quantization_config")
        scheme = None if quantised is None else scheme_of(quantised)
        attention_bias = bool(raw.get("attention_bias", False))
        return cls(
            family=family,
            vocab_size=raw["vocab_size"],
            hidden=raw["hidden_size"],
            intermediate=raw["intermediate_size"],
            layers=raw["num_hidden_layers"],
            heads=heads,
            kv_heads=raw.get("num_key_value_heads", heads),
            head_dim=raw.get("head_dim", raw["hidden_size"] // heads),
            context=raw.get("max_position_embeddings", 2048),
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope=_rope(raw),
            qkv_bias=bool(raw.get("qkv_bias", False)) or (attention_bias and family != "mistral"),
            output_bias=attention_bias and family in ("llama", "qwen3"),
            mlp_bias=bool(raw.get("mlp_bias", False)) and family == "llama",
            qk_norm=bool(raw.get("qk_norm", False)),
            tied_head=bool(raw.get("tie_word_embeddings", False)),
            window=_window(raw),
            eos=_ids(raw.get("eos_token_id")),
            dtype=FLOAT_TYPES.get(str(raw.get("dtype", raw.get("torch_dtype", "float32"))), torch.float32),
            block=1 if scheme is None else scheme.block,
            scheme=scheme,
        )


def is_quantised(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a model of one of our families with a ``quantization_config``."""
    raw = read_json(pathlib.Path(folder), "config.json")
    return raw.get("model_type") in FAMILIES and raw.get("quantization_config") is not None


@contextlib.contextmanager
def naming(file: str) -> Iterator[None]:
    """Errors about a file's content begin with its name."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"{file} has no {error.args[0]!r}") from None
    except MulticardError as error:
        raise type(error)(str(error) if str(error).startswith(file) else f"{file}: {error}") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:  # a value of another kind
        raise CheckpointError(f"{file} is damaged ({type(error).__name__}: {error})") from None


def _refuse(raw: Mapping[str, Any]) -> None:
    if (activation := raw.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise UnsupportedError(f"hidden_act {activation!r}: the decoder's MLP has silu only")
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError(f"partial_rotary_factor {raw['partial_rotary_factor']}: the decoder rotates whole heads")


def _rope(raw: Mapping[str, Any]) -> RopeConfig:
    """New key: ``rope_parameters``; old keys: ``rope_theta`` and ``rope_scaling``, with the kind once in ``type``."""
    spelled: dict[str, Any] = {**raw.get("rope_scaling", {}), **raw.get("rope_parameters", {})}
    kind = spelled.get("rope_type", spelled.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise UnsupportedError(f"rope type {kind!r}: the decoder has {', '.join(ROPE_TYPES)}")
    if spelled.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError("rope_parameters.partial_rotary_factor: the decoder rotates whole heads")
    return RopeConfig(
        theta=float(spelled.get("rope_theta", raw.get("rope_theta", 10000.0))),
        kind=kind,
        factor=float(spelled["factor"]) if kind != "default" else 1.0,
        low_freq_factor=float(spelled["low_freq_factor"]) if kind == "llama3" else 1.0,
        high_freq_factor=float(spelled["high_freq_factor"]) if kind == "llama3" else 4.0,
        original_context=int(spelled["original_max_position_embeddings"]) if kind == "llama3" else 8192,
    )


def _window(raw: Mapping[str, Any]) -> int | None:
    kinds = raw.get("layer_types")
    unknown = sorted(set(kinds or ()) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UnsupportedError(f"layer_types {', '.join(unknown)}: the decoder has full attention only")
    if kinds and "sliding_attention" not in kinds:
        return None
    uses = raw.get("use_sliding_window", raw["model_type"] == "mistral")
    return int(raw["sliding_window"]) if uses and raw.get("sliding_window") else None


def _ids(value: Any) -> tuple[int, ...]:
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(each, int) for each in ids):
        raise ConfigError(f"eos_token_id={value!r}: a token id or a list of them")
    return ids
