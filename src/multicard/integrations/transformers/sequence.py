"""Prompts and caches too long for one card: hooks that split a ``transformers`` decoder's sequence over ranks.

The decoder gets this rank's slice of a long prompt and puts its keys in a sharded cache; short chunks and decoded
tokens are computed by every rank. ``generate()`` and the modelling code aren't changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from multicard import collectives
from multicard.attention.sequence import flatten, to_natural_order
from multicard.errors import UnsupportedError
from multicard.integrations.calls import named, parameters
from multicard.integrations.seams import Hooks, bypassed
from multicard.integrations.transformers import attention
from multicard.integrations.transformers.cache import CACHE_NAMES, Chunk, ShardedCache, cache_name, take
from multicard.integrations.transformers.heads import uses_interface
from multicard.mesh import ParallelMesh

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = (
    "afmoe", "apertus", "arcee", "axk1", "cohere", "cohere2", "cohere2_moe", "cwm", "deepseek_v2", "deepseek_v3",
    "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo", "gemma", "gemma3_text", "glm", "glm4",
    "glm4_moe", "glm4_moe_lite", "gpt2", "gpt_bigcode", "gpt_neox", "granite", "granitemoe", "granitemoeshared",
    "helium", "hy_v3", "internlm3", "iquestcoder", "jais2", "jetmoe", "laguna", "llama", "longcat_flash", "mellum",
    "minicpm3", "minimax_m2", "ministral", "ministral3", "mistral", "mixtral", "nanochat", "nemotron", "olmo", "olmo2",
    "olmo3", "olmoe", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss",
    "smollm3", "solar_open", "stablelm", "starcoder2", "youtu",
)  # fmt: skip
"""Decoders in which tokens interact only through attention. The tests split a model of each."""


def check(model: PreTrainedModel, mesh: ParallelMesh) -> None:
    """Refuse models that can't have a split sequence, before anything is changed.

    Raises:
        UnsupportedError: names the model and the reason.
    """
    kind, name = model.config.model_type, type(model).__name__
    why = None
    if kind not in FAMILIES:
        why = (
            f"model_type={kind!r} isn't among those whose tokens are known to interact only through attention "
            f"({', '.join(FAMILIES)})"
        )
    elif getattr(model.config, "attn_logit_softcapping", None):
        why = "its attention caps scores, which the kernels don't"
    elif set(getattr(model.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        why = f"its layers are {sorted(set(model.config.layer_types))}"
    elif not all(map(_is_causal, (model.config, *model.modules()))):
        why = "it isn't a causal decoder"
    if why:
        raise UnsupportedError(
            f"{name} with ring={mesh.ring.size}, ulysses={mesh.ulysses.size}: {why}; use tp={mesh.world.size} instead"
        )


def _is_causal(holder: object) -> bool:
    """Whether it is causal: unless its config says otherwise, as those of Gemma 3's embedding models do."""
    return getattr(holder, "is_causal", True) is not False


def attach(model: PreTrainedModel, mesh: ParallelMesh, hooks: Hooks) -> Sequence:
    """Split the sequence of ``model`` over ``mesh.sequence`` from now on. To be called before its weights are split."""
    attention.register()
    model.config._attn_implementation = attention.NAME
    decoder = model.get_decoder()
    attentions = {module for module in decoder.modules() if hasattr(module, "forward") and uses_interface(module)}
    rotary = [module for module in decoder.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    sequence = Sequence(model, mesh, attentions, bool(rotary))
    for module in attentions:
        object.__setattr__(module, "_multicard_sequence", sequence)
    for module in rotary:
        hooks.before(module, sequence.before_rotary)
        hooks.after(module, sequence.after_rotary)
    hooks.before(decoder, sequence.before)
    hooks.after(decoder, sequence.after)
    return sequence


class Sequence:
    """One model's split sequence: the state that its hooks share during a forward pass.

    Attributes:
        step: the current pass, or None.
    """

    def __init__(
        self, model: PreTrainedModel, mesh: ParallelMesh, attentions: set[nn.Module], has_rotary: bool
    ) -> None:
        self.config, self.mesh = model.config, mesh
        self.cache_name = cache_name(model.get_decoder())
        self.step: attention.Step | None = None
        self.cache: ShardedCache | None = None
        self.positions: Tensor | None = None
        self.logits_to_keep = 0
        self._attentions, self._has_rotary = attentions, has_rotary
        self._rotations = [0, 0]  # calls of rotary embeddings that began and ended in this pass
        self._passes = 0

    def begin_call(self, given: Mapping[str, Any]) -> None:
        """Called before the whole model runs, with its arguments."""
        wanted = given.get("logits_to_keep", 0)  # the decoder doesn't get this argument
        self.logits_to_keep = wanted if isinstance(wanted, int) else 0
        self._passes, self.step = 0, None

    def end_call(self) -> None:
        """Called after the whole model has run.

        Raises:
            UnsupportedError: the decoder did not run through our hooks.
        """
        unfinished, self.step = self.step is not None, None
        if unfinished or not self._passes:
            raise bypassed("transformers", "the decoder ran without the hooks that split and gather its tokens")

    def before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The decoder's pre-hook: make the step, give the decoder its slice and the sharded cache."""
        if torch.compiler.is_compiling():
            from multicard.integrations.uncompiled import SEQUENCE, refuse

            refuse(type(decoder).__name__, SEQUENCE)
        given = named(parameters(type(decoder).forward), args, kwargs)
        given = {name: value for name, value in given.items() if value is not None}
        tokens = given.get("input_ids", given.get("inputs_embeds"))
        if tokens is None:
            raise UnsupportedError("a forward pass without input_ids or inputs_embeds can't be split")
        past = [given.pop(name) for name in CACHE_NAMES if name in given]
        _refuse_arguments(given, self.config, tokens.shape[:2], fresh=not past)
        self.cache = self._cache(given, past)
        chunk = Chunk.of(self.cache.length if self.cache else 0, tokens.shape[1], self.mesh.sequence)
        if self.cache is not None:
            self.cache.chunk = chunk
            given[self.cache_name] = self.cache
        keys = self.cache.spans() if self.cache is not None else chunk.held
        self.step = attention.Step(self.mesh, chunk, keys, _padding(given.get("attention_mask"), chunk))
        self._rotations = [0, 0]
        if chunk.sliced:
            self._slice(given, chunk, tokens)
        return (), given

    def _cache(self, given: dict[str, Any], past: list[Any]) -> ShardedCache | None:
        cache = past[0] if past else None
        if isinstance(cache, ShardedCache):
            return cache
        if cache is not None and (type(cache).__name__ != "DynamicCache" or cache.get_seq_length()):
            raise UnsupportedError(
                f"a {type(cache).__name__} of {cache.get_seq_length()} tokens with a split sequence: pass an empty "
                "DynamicCache or none, and continue with the returned one"
            )
        wanted = given.get("use_cache", getattr(self.config, "use_cache", False))
        return ShardedCache(self.mesh.sequence) if wanted or cache is not None else None

    def _slice(self, given: dict[str, Any], chunk: Chunk, tokens: Tensor) -> None:
        positions = given.get("position_ids")
        if positions is None:
            positions = torch.arange(chunk.start, chunk.stop, device=tokens.device)[None]
        self.positions = positions
        given["position_ids"] = take(positions, chunk.mine, chunk.start, -1)
        for name in ("input_ids", "inputs_embeds"):
            if name in given:
                given[name] = take(given[name], chunk.mine, chunk.start, 1)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The decoder's forward hook: give every rank the rows that the head reads. One all-gather."""
        step, cache = self.step, self.cache
        assert step is not None
        self._prove(step, cache)
        if cache is not None:
            cache.end()
        if step.chunk.sliced:
            output["last_hidden_state"] = self._gather(output["last_hidden_state"], step.chunk)
        self.step = self.cache = self.positions = None
        self.logits_to_keep = 0
        self._passes += 1
        return output

    def _prove(self, step: attention.Step, cache: ShardedCache | None) -> None:
        """Raise UnsupportedError unless this pass went through every seam."""
        count = len(self._attentions)
        if step.attended != self._attentions:
            raise bypassed(
                "transformers",
                f"{len(step.attended & self._attentions)} of {count} attention modules called the attention function "
                "for a split sequence",
            )
        if cache is not None and cache.written() != count:
            raise bypassed(
                "transformers",
                f"{cache.written()} of {count} attention modules wrote the {step.chunk.length} new tokens into the "
                "sharded cache",
            )
        begun, ended = self._rotations
        if step.chunk.sliced and self._has_rotary and (begun != ended or not begun):
            raise bypassed("transformers", "rotary embeddings weren't computed from all positions")

    def _gather(self, hidden: Tensor, chunk: Chunk) -> Tensor:
        """``(batch, rows here, hidden)`` to the last ``logits_to_keep`` rows of the chunk, or all, on every rank."""
        first = max(chunk.stop - self.logits_to_keep, chunk.start) if self.logits_to_keep else chunk.start
        wanted = [tuple(range(max(s.start, first), s.stop) for s in spans if s.stop > first) for spans in chunk.held]
        skipped = hidden.shape[1] - sum(map(len, wanted[chunk.axis.rank]))
        mine = hidden[:, skipped:].contiguous()  # a rank's rows are in increasing order
        rows = collectives.all_gather(mine, chunk.axis, 1, [sum(map(len, spans)) for spans in wanted])
        return to_natural_order(rows, flatten(wanted), 1)

    def before_rotary(self, rotary: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Some rotary embeddings read the largest position: they get all of them, and are cut afterwards."""
        if self.step is None or not self.step.chunk.sliced:
            return None
        self._rotations[0] += 1
        return (), {**named(parameters(type(rotary).forward), args, kwargs), "position_ids": self.positions}

    def after_rotary(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.step is None or not self.step.chunk.sliced:
            return output
        chunk = self.step.chunk
        self._rotations[1] += 1
        if isinstance(output, Tensor):
            return take(output, chunk.mine, chunk.start, 1)
        return tuple(take(x, chunk.mine, chunk.start, 1) for x in output)


def _padding(mask: Tensor | None, chunk: Chunk) -> Tensor | None:
    """The 2-D mask as bool, or None if there is no padding."""
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[1] != chunk.stop:
        raise UnsupportedError(
            f"attention_mask of shape {tuple(mask.shape)} with a split sequence: must be (batch, {chunk.stop}), "
            "ones and zeros for all tokens so far"
        )
    keep = mask.bool()
    return None if bool(keep.all()) else keep


def _refuse_arguments(given: dict[str, Any], config: Any, shape: torch.Size, *, fresh: bool) -> None:
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        if given.get(name, getattr(config, name, False)):
            raise UnsupportedError(f"{name}=True with a split sequence would give slices: use tp alone")
    if given.get("return_dict") is False:
        raise UnsupportedError("return_dict=False with a split sequence: leave it True")
    known = {"input_ids", "inputs_embeds", "attention_mask", "position_ids"}
    for name, value in given.items():
        if name not in known and isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == shape[1] > 1:
            raise UnsupportedError(f"{name} of shape {tuple(value.shape)} with a split sequence: use tp alone")
    positions, packed = given.get("position_ids"), "attention_mask" not in given and fresh
    if positions is not None and packed and bool((positions.diff(dim=-1) != 1).any()):
        raise UnsupportedError("position_ids of packed sequences with a split sequence: pass one sequence a row")
