"""``transformers`` models with the interface of our own decoder: ``LLM`` uses them for other architectures."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from multicard import mesh as meshes
from multicard.config import ParallelConfig
from multicard.errors import UnsupportedError
from multicard.integrations.transformers import load as loading
from multicard.integrations.transformers.cache import cache_name
from multicard.integrations.transformers.parallelize import load_model, parallelize
from multicard.integrations.untrusted import blamed_on
from multicard.mesh import ParallelMesh
from multicard.weights import Checkpoint, LoadReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The limits that a request is checked against.

    Attributes:
        vocab_size: token ids are below it.
        context: the most positions that the model supports.
        eos: ids that end an answer.
        window: None: the model handles sliding windows itself.
    """

    vocab_size: int
    context: int
    eos: tuple[int, ...]
    window: None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelConfig:
        text = model.config.get_text_config(decoder=True)
        eos = model.generation_config.eos_token_id if model.can_generate() else None
        ids = (eos,) if isinstance(eos, int) else tuple(eos or ())
        return cls(text.vocab_size, getattr(text, "max_position_embeddings", 1 << 20), ids)


def check_folder(path: str | os.PathLike[str], degrees: ParallelConfig) -> ModelConfig:
    """Refuse a checkpoint, as far as that is possible without starting a rank: a dry run of the split on "meta".

    Raises:
        CheckpointError: there is no config, or none that transformers knows.
        UnsupportedError: the architecture can't be split over these degrees, or doesn't generate text.
    """
    model = loading.build(path, None, None)
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise UnsupportedError(f"{type(model).__name__} doesn't generate text from a prompt: use mc.from_pretrained")
    Checkpoint(path).close()
    with blamed_on(f"{path}: config.json or generation_config.json is damaged"):
        config = ModelConfig.of(model)
    parallelize(model, meshes.outline(degrees))
    return config


@dataclasses.dataclass
class Cache:
    """The tokens so far.

    Attributes:
        starts: the number of padding tokens before every prompt.
        length: tokens so far, including padding.
        past: transformers' own cache; None before the first step.
    """

    starts: tuple[int, ...]
    length: int = 0
    past: Any = None


class TransformersDecoder:
    """A split ``transformers`` model with the interface of our own decoder: token ids and a cache in, logits out.

    Every rank gets all logits, so sampling sees a mesh of one rank.
    """

    def __init__(self, model: PreTrainedModel, mesh: ParallelMesh) -> None:
        self.model, self.config = model, ModelConfig.of(model)
        self.takes = inspect.signature(model.forward).parameters
        self.cache_name = cache_name(model)
        self.mesh = meshes.single(mesh.device)
        self.vocabulary = range(self.config.vocab_size)

    @property
    def lm_head(self) -> TransformersDecoder:
        """Stands in for the decoder's head: its ``vocabulary`` is the range of the logits' ids."""
        return self

    def new_cache(self, capacity: int, starts: Sequence[int] = (0,)) -> Cache:
        """An empty cache for prompts padded in front; it grows as needed."""
        return Cache(tuple(starts))

    def __call__(self, ids: Tensor, cache: Cache, last_only: bool = True) -> Tensor:
        """``(batch, tokens)`` to float logits ``(batch, 1 or tokens, vocabulary)``, the same on every rank."""
        stop = cache.length + ids.shape[1]
        starts = torch.tensor(cache.starts, device=ids.device)[:, None]
        slots = torch.arange(stop, device=ids.device)[None]
        given: dict[str, Any] = {"input_ids": ids, self.cache_name: cache.past, "use_cache": True}
        if any(cache.starts):
            given["attention_mask"] = (slots >= starts).long()
        if "position_ids" in self.takes:
            given["position_ids"] = (slots[:, cache.length :] - starts).clamp(min=0)
        if last_only and "logits_to_keep" in self.takes:
            given["logits_to_keep"] = 1
        out = self.model(**given)
        cache.past, cache.length = out[self.cache_name], stop
        return out.logits[:, -1:] if last_only else out.logits


def load_decoder(
    mesh: ParallelMesh, folder: str | os.PathLike[str], dtype: torch.dtype | None = None, checksums: bool = False
) -> Iterator[float | tuple[TransformersDecoder, LoadReport]]:
    """The decoder in ``folder``; the interface is that of :func:`multicard.models.load.load_decoder`."""
    for done in load_model(folder, mesh, dtype=dtype, checksums=checksums):
        yield done if isinstance(done, float) else (TransformersDecoder(done[0], mesh), done[1])
