"""A matrix of blocks in memory: the bytes of a file, of which those of 16 rows lie side by side.

So one instruction on 16 words does the same to 16 rows, and no sum goes across a vector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from multicard.quantized.bits import Bytes
from multicard.quantized.types import BLOCK_TYPES, Bits, BlockType, Group

LANES = 16  # words of the widest vectors
WORD = 4  # bytes
LARGE = 64  # bytes of a block to which two more, where it needs them, are less than 3%


class Run(NamedTuple):
    """Adjacent units of a row that are alike: of ``together`` blocks in ``words`` words, from word ``first`` on."""

    together: int
    units: int
    first: int
    words: int


@dataclasses.dataclass(frozen=True)
class Blocks:
    """``rows`` rows of ``width`` blocks each.

    They are kept as int32 ``(tiles, row_words, LANES)``; then those rows that don't fill a tile, as one that is
    narrower. All in one dimension.

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
    def columns(self) -> int:
        return self.width * self.type.columns

    @property
    def padded(self) -> int:
        """Bytes that a block takes: a large one, whole words."""
        size = self.type.size
        return size + -size % WORD if size > LARGE else size

    @property
    def row_words(self) -> int:
        """Of a row, of which the last may have two bytes more than the row."""
        return -(-self.width * self.padded // WORD)

    @property
    def words(self) -> int:
        """Of all rows."""
        return self.rows * self.row_words

    @property
    def runs(self) -> list[Run]:
        """A row's blocks: by twos where only two together fill whole words, and then perhaps one alone."""
        size = self.padded
        together = 1 if size % WORD == 0 else 2
        units, rest = divmod(self.width, together)
        words = together * size // WORD
        runs = [Run(together, units, 0, words)] if units else []
        return [*runs, Run(1, 1, units * words, -(-size // WORD))] if rest else runs

    def in_words(self, raw: Tensor) -> Tensor:
        """Rows of a file's bytes, uint8 ``(rows, width, type.size)``, as int32 ``(rows, row_words)``."""
        beyond = self.padded - self.type.size
        flat = (F.pad(raw, (0, beyond)) if beyond else raw).flatten(1)
        missing = self.row_words * WORD - flat.shape[1]
        return (F.pad(flat, (0, missing)) if missing else flat).contiguous().view(torch.int32)

    def interleave(self, raw: Tensor, out: Tensor | None = None) -> Tensor:
        """The same as they are kept, ``(words,)``; written into ``out`` if that is given."""
        out = torch.empty(self.words, dtype=torch.int32) if out is None else out
        rest = self.in_words(raw)
        for tiles in self.tiles(out):
            count, _, lanes = tiles.shape
            some, rest = rest[: count * lanes], rest[count * lanes :]
            tiles.copy_(some.view(count, lanes, self.row_words).transpose(1, 2))
        return out

    def tiles(self, held: Tensor) -> list[Tensor]:
        """Views ``(tiles, row_words, lanes)`` of what :meth:`interleave` returns: whole tiles, and the rest."""
        rest = self.rows % LANES
        full = (self.rows - rest) * self.row_words
        views = [held[:full].view(-1, self.row_words, LANES)] if full else []
        return [*views, held[full:].view(1, self.row_words, rest)] if rest else views

    def groups(self, bits: Bits, together: int) -> Iterator[Group]:
        """What sections of a unit of so many blocks hold, in the order of columns."""
        groups = self.type.groups
        assert groups is not None, f"{self.kind} has no blocks"
        for number in range(together):
            yield from groups(bits, number * self.padded)

    def values(self, words: Tensor) -> Tensor:
        """Numbers, float32 ``(rows, columns)``, from the words of whole rows, ``(rows, row_words)``."""
        raw = words.contiguous().view(torch.uint8)[:, : self.width * self.padded].view(-1, self.width, self.padded)
        parts = []
        for scale, codes, zero, minimum in self.groups(Bytes(raw, self.type.sections), 1):
            part = codes.float()
            part = (part.sub_(zero) if zero else part).mul_(scale.unsqueeze(-1))
            parts.append(part if minimum is None else part.add_(minimum.unsqueeze(-1)))
        return (torch.cat(parts, -1) if len(parts) > 1 else parts[0]).flatten(1)


def dequantize(kind: str, raw: Tensor) -> Tensor:
    """A file's bytes, uint8 ``(rows, width, size of a block)``, as float32 ``(rows, columns)``."""
    blocks = Blocks(kind, *raw.shape[:2])
    return blocks.values(blocks.in_words(raw))
