"""The weight of a parallel layer, or of an embedding, in blocks.

The layer stays what it is: its parameter holds words instead of numbers, and what multiplies with it is replaced.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multicard.layers import packed, rows
from multicard.layers.shard import shard_of, sharded
from multicard.quantized.products import few_rows, in_chunks, lookup
from multicard.quantized.words import Blocks


@dataclasses.dataclass(frozen=True)
class BlockWeight:
    """A matrix whose rows come in parts, each of one type of blocks, in one int32 parameter.

    Attributes:
        parts: one after the other; all have blocks for the same columns.
        before: columns that the first block has before this rank's: a cut may be inside a block.
        columns: of this rank.
        dtype: of rows that are looked up.
    """

    parts: tuple[Blocks, ...]
    before: int
    columns: int
    dtype: torch.dtype

    @property
    def words(self) -> int:
        return sum(part.words for part in self.parts)

    @property
    def kinds(self) -> str:
        return "+".join(part.kind for part in self.parts)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x Aᵀ + b`` for any number of rows: some rows of the weight at a time are widened and multiplied."""
        native = x.dtype in packed.PACKED_TYPES and packed.available(x.dtype)
        flat = x.reshape(-1, self.columns)
        flat = flat if native else flat.float()
        products = [
            rows.multiply(filled, some.to(flat.dtype), None)
            for part, held in self._held(weight)
            for filled in [self._filled(flat, part)]
            for some in in_chunks(part, held)
        ]
        y = torch.cat(products, -1)
        return (y if bias is None else y + bias).to(x.dtype).view(*x.shape[:-1], -1)

    def few_rows(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same for a few rows, sums in float32. To be compiled."""
        flat = x.reshape(-1, self.columns).float()
        sums = [few_rows(part, held, self._filled(flat, part).unbind(0)) for part, held in self._held(weight)]
        y = torch.cat(sums, -1).to(x.dtype)
        return (y if bias is None else y + bias).view(*x.shape[:-1], -1)

    def numbers(self, weight: Tensor) -> Tensor:
        """The matrix in float32, ``(rows, columns)``."""
        here = slice(self.before, self.before + self.columns)
        return torch.cat([some[:, here] for part, held in self._held(weight) for some in in_chunks(part, held)])

    def lookup(self, numbers: Tensor, weight: Tensor) -> Tensor:
        """Rows of the only part by number, ``(..., columns)``."""
        (part,) = self.parts
        return lookup(part, weight, numbers)[..., self.before : self.before + self.columns].to(self.dtype)

    def _held(self, weight: Tensor) -> list[tuple[Blocks, Tensor]]:
        return list(zip(self.parts, weight.split([part.words for part in self.parts]), strict=True))

    def _filled(self, x: Tensor, part: Blocks) -> Tensor:
        """``x`` with zeros for those columns of blocks that this rank doesn't have."""
        after = part.columns - self.before - self.columns
        return F.pad(x, (self.before, after)) if self.before or after else x


def declare_blocks(weight: BlockWeight, declared: nn.Parameter) -> nn.Parameter:
    """A parameter in blocks, with the shard rule and on the device of a declared one."""
    parameter = sharded(torch.empty(weight.words, dtype=torch.int32, device=declared.device), shard_of(declared))
    parameter.blocks = weight  # type: ignore[attr-defined]
    return parameter


def hold(module: nn.Module, parameter: nn.Parameter) -> nn.Parameter:
    """Make a parameter in blocks the weight of ``module``, which multiplies with it or looks rows up in it."""
    weight = blocks_of(parameter)
    assert weight is not None
    module.weight = parameter
    name, function = ("lookup", weight.lookup) if hasattr(module, "lookup") else ("multiply", weight.multiply)
    setattr(module, name, function)
    return parameter


def blocks_of(parameter: Tensor) -> BlockWeight | None:
    """What a parameter in blocks holds; None: numbers."""
    return getattr(parameter, "blocks", None)
