"""A matrix of blocks in memory: the bytes of a file, of which those of 16 rows lie side by side.

So one instruction on 16 words does the same to 16 rows, and no sum goes across a vector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from multicard.quantized.bits import Bytes
from multicard.quantized.types import BLOCK_TYPES, Bits, BlockType, Group

LANES = 16  # words of the widest vectors
WORD = 4  # bytes


@dataclasses.dataclass(frozen=True)
class Blocks:
    """``rows`` rows of ``width`` blocks each.

    They are kept as int32 ``(tiles, units, words, LANES)``, where a unit is a block, or two where only both together
    fill whole words; then those rows that don't fill a tile, as one that is narrower. All in one dimension.

    Attributes:
        kind: the name of the blocks' type.
    """

    kind: str
    rows: int
    width: int

    @property
    def type(self) -> BlockType:
        return BLOCK_TYPES[self.kind]

    @property
    def together(self) -> int:
        """Blocks in a unit."""
        return 1 if self.type.size % WORD == 0 else 2

    @property
    def units(self) -> int:
        return -(-self.width // self.together)

    @property
    def columns(self) -> int:
        """Of a row, with those that fill its last unit."""
        return self.units * self.together * self.type.columns

    @property
    def unit_words(self) -> int:
        return self.together * self.type.size // WORD

    @property
    def words(self) -> int:
        """Of all rows."""
        return self.rows * self.units * self.unit_words

    def in_words(self, raw: Tensor) -> Tensor:
        """Rows of a file's bytes, uint8 ``(rows, width, type.size)``, as int32 ``(rows, units, unit_words)``."""
        missing = self.units * self.together - self.width
        filled = F.pad(raw, (0, 0, 0, missing)) if missing else raw
        return filled.flatten(1).contiguous().view(torch.int32).view(self.rows, self.units, self.unit_words)

    def interleave(self, raw: Tensor) -> Tensor:
        """The same as they are kept, ``(words,)``."""
        words = self.in_words(raw)
        full = self.rows - self.rows % LANES
        tiles = words[:full].view(-1, LANES, self.units, self.unit_words).permute(0, 2, 3, 1)
        return torch.cat([tiles.reshape(-1), words[full:].permute(1, 2, 0).reshape(-1)])

    def tiles(self, held: Tensor) -> list[Tensor]:
        """Views ``(tiles, units, words, lanes)`` of what :meth:`interleave` returns: whole tiles, and the rest."""
        rest = self.rows % LANES
        full = (self.rows - rest) * self.units * self.unit_words
        shape = (-1, self.units, self.unit_words)
        views = [held[:full].view(*shape, LANES)] if full else []
        return [*views, held[full:].view(*shape, rest)] if rest else views

    def groups(self, bits: Bits) -> Iterator[Group]:
        """What units hold, in the order of columns."""
        groups = self.type.groups
        assert groups is not None, f"{self.kind} has no blocks"
        for number in range(self.together):
            yield from groups(bits, number * self.type.size)

    def values(self, words: Tensor) -> Tensor:
        """Numbers, float32 ``(rows, columns)``, from the words of whole rows, ``(rows, units, unit_words)``."""
        bits = Bytes(words.contiguous().view(torch.uint8))
        parts = []
        for scale, codes, zero, minimum in self.groups(bits):
            part = codes.float()
            part = (part.sub_(zero) if zero else part).mul_(scale.unsqueeze(-1))
            parts.append(part if minimum is None else part.add_(minimum.unsqueeze(-1)))
        return torch.cat(parts, -1).flatten(1) if len(parts) > 1 else parts[0].flatten(1)


def dequantize(kind: str, raw: Tensor) -> Tensor:
    """A file's bytes, uint8 ``(rows, width, size of a block)``, as float32 ``(rows, columns)``."""
    blocks = Blocks(kind, *raw.shape[:2])
    return blocks.values(blocks.in_words(raw))[:, : blocks.width * blocks.type.columns]
