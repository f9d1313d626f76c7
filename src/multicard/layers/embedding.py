"""The vocabulary's input side: an embedding with rows split over ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multicard import collectives, partition
from multicard.axis import Axis
from multicard.errors import ConfigError
from multicard.layers.shard import Shard, cut, empty, shard_of


class VocabParallelEmbedding(nn.Module):
    """Token ids to vectors; each rank looks up the rows that it holds, and one all-reduce adds the others.

    Exact in every dtype: for each id all ranks but one add zeros.

    Args:
        num_embeddings: the vocabulary's size, any number; the first ranks hold one row more.
        embedding_dim: size of a vector.
        axis: the ranks that share the vocabulary.
        checks: look for ids that aren't in the vocabulary, which waits for the device; False: the caller has done so.
    """

    lookup: Callable[[Tensor, Tensor], Tensor] = staticmethod(F.embedding)  # packing changes it

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        axis: Axis,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        checks: bool = True,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.axis, self.checks = num_embeddings, embedding_dim, axis, checks
        self.dtype = dtype or torch.get_default_dtype()
        self.vocabulary = partition.split(num_embeddings, axis.size)[axis.rank]
        shard = Shard((num_embeddings, embedding_dim), 0, (self.vocabulary,) if self.vocabulary else ())
        self.weight = empty(shard, dtype, device)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, axis: Axis) -> VocabParallelEmbedding:
        """This rank's copy of its rows of ``embedding``; one with ``max_norm``, which changes its rows, is refused."""
        if embedding.max_norm is not None:
            raise ConfigError(f"max_norm={embedding.max_norm}: VocabParallelEmbedding takes max_norm=None only")
        vocabulary, hidden = embedding.weight.shape
        layer = cls(vocabulary, hidden, axis, device="meta")
        layer.weight = cut(embedding.weight, shard_of(layer.weight))
        return layer

    def forward(self, ids: Tensor) -> Tensor:
        """Integer ``(...)``, the same on every rank, to ``(..., embedding_dim)``, the same on every rank.

        Raises:
            ConfigError: an id that is negative or not in the vocabulary, on every rank alike, if this layer checks;
                RuntimeError in a compiled graph, which can't read it.
        """
        if self.checks:
            self._check(ids)
        if self.axis.size == 1:
            return self.lookup(ids, self.weight)
        if self.vocabulary:
            local = ids - self.vocabulary.start
            mine = (local >= 0) & (local < len(self.vocabulary))
            rows = self.lookup(local * mine, self.weight).masked_fill_(~mine.unsqueeze(-1), 0)
        else:
            rows = self.weight.new_zeros(*ids.shape, self.embedding_dim, dtype=self.dtype)
        return collectives.all_reduce(rows, self.axis)

    def _check(self, ids: Tensor) -> None:
        limit = f"ids are 0 to {self.num_embeddings - 1}"
        if torch.compiler.is_compiling():
            known = ((ids >= 0) & (ids < self.num_embeddings)).all()
            torch._assert_async(known, f"a token id is not in the vocabulary: {limit}")
            return
        if not ids.numel():
            return
        low, high = (int(bound) for bound in torch.stack(ids.aminmax()).tolist())
        if low < 0 or high >= self.num_embeddings:
            wrong = low if low < 0 else high
            raise ConfigError(f"token id {wrong} is not in the vocabulary: {limit}")

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, here={self.vocabulary}"
