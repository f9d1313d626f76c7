"""Prompts of unequal lengths side by side in one row, so that no padding is computed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from multicard.models.kv_cache import KVCache


class PackedPrompts:
    """What a model is given in place of ``cache``, which is empty, for its first tokens: all prompts concatenated.

    Projections, MLPs and norms see one long row; attention is computed for each prompt by itself, and its keys and
    values are written into its own row of ``cache``.

    Args:
        cache: with room for every prompt.
        lengths: of the prompts.
    """

    def __init__(self, cache: KVCache, lengths: Sequence[int]) -> None:
        stops = list(itertools.accumulate(lengths))
        self._cache, self._rows, self._stops = cache, cache.rows(), stops
        self._spans = [slice(start, stop) for start, stop in itertools.pairwise([0, *stops])]
        self.length = max(lengths)

    def advance(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """``(1, tokens of all prompts)``; returns them and their positions."""
        each = [row.advance(ids[:, span])[1] for row, span in zip(self._rows, self._spans, strict=True)]
        self._cache.length = self.length
        return ids, torch.cat(each, 1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As :meth:`KVCache.attend`, of each prompt to itself."""
        pairs = zip(self._rows, self._spans, strict=True)
        return torch.cat([row.attend(layer, q[:, span], k[:, span], v[:, span]) for row, span in pairs], 1)

    def last(self, x: Tensor) -> Tensor:
        """Every prompt's last token, ``(prompts, 1, hidden)``."""
        return x[0, [stop - 1 for stop in self._stops]].unsqueeze(1)

    def whole(self, x: Tensor) -> Tensor:
        return x
