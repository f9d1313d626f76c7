"""The vocabulary's output side: the language-model head, and gathering a sharded last dimension."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multicard import collectives, partition
from multicard.axis import Axis
from multicard.errors import ConfigError
from multicard.layers.shard import Shard, check_shares, count, cut, empty, shard_of


class GatherLastDim(nn.Module):
    """Gathers the last dimension, which is sharded over ranks, on every rank. One all-gather.

    Args:
        axis: the ranks that hold shards.
        size: the whole dimension's length; None: every rank holds as many features as this one.
        shares: every rank's spans of it; None: an even split of ``size``. A feature that several ranks hold is taken
            from the first.

    Raises:
        ConfigError: no rank holds a feature.
    """

    def __init__(self, axis: Axis, size: int | None = None, shares: Sequence[Sequence[range]] | None = None) -> None:
        super().__init__()
        self.axis = axis
        self.sizes: tuple[int, ...] | None = None
        self.order: Tensor | None = None
        if size is None:
            return
        checked = check_shares(shares, size, axis)
        self.sizes = tuple(map(count, checked))
        held = [row for spans in checked for span in spans for row in span]
        if held != list(range(size)):
            place = {row: i for i, row in reversed(list(enumerate(held)))}
            if len(place) != size:
                raise ConfigError(
                    f"ranks hold {len(place)} of {size} features to gather: assign each feature to at least one rank"
                )
            self.order = torch.tensor([place[row] for row in range(size)])

    def forward(self, x: Tensor) -> Tensor:
        """``(..., this rank's features)`` to ``(..., all features)``, the same on every rank."""
        y = collectives.all_gather(x, self.axis, dim=-1, sizes=self.sizes)
        return y if self.order is None else y.index_select(-1, self.order.to(y.device))


class ParallelLMHead(nn.Module):
    """Logits of this rank's slice of the vocabulary: a column-parallel linear without bias, by vocabulary rows.

    Choosing the next token doesn't need all logits (:mod:`multicard.models.sampling`); ``gather_output`` gathers them.

    Args:
        embedding_dim: the hidden size.
        num_embeddings: the vocabulary's size, any number.
        axis: the ranks that share it.
        weight: an embedding's weight to share (a tied head): the same parameter, no copy.
    """

    multiply: Callable[[Tensor, Tensor, Tensor | None], Tensor] = staticmethod(F.linear)

    def __init__(
        self,
        embedding_dim: int,
        num_embeddings: int,
        axis: Axis,
        gather_output: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        weight: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.axis, self.num_embeddings = axis, num_embeddings
        self.vocabulary = partition.split(num_embeddings, axis.size)[axis.rank]
        shard = Shard((num_embeddings, embedding_dim), 0, (self.vocabulary,) if self.vocabulary else ())
        if weight is not None and tuple(weight.shape) != shard.local_shape:
            raise ConfigError(f"a tied weight of shape {tuple(weight.shape)} where {shard.local_shape} is this rank's")
        self.weight = empty(shard, dtype, device) if weight is None else weight
        self.gather = GatherLastDim(axis, num_embeddings) if gather_output else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, axis: Axis, gather_output: bool = False) -> ParallelLMHead:
        """This rank's copy of its vocabulary rows. A head with a bias is refused."""
        if linear.bias is not None:
            raise ConfigError("ParallelLMHead has no bias: use ColumnParallelLinear.from_linear for this one")
        vocabulary, hidden = linear.weight.shape
        head = cls(hidden, vocabulary, axis, gather_output, device="meta")
        head.weight = cut(linear.weight, shard_of(head.weight))
        return head

    def forward(self, x: Tensor) -> Tensor:
        """``(..., hidden)`` to ``(..., this rank's vocabulary)``, or the whole vocabulary with ``gather_output``."""
        y = self.multiply(x, self.weight, None)
        return y if self.gather is None else self.gather(y)
