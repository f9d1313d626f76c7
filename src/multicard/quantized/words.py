"""A matrix of blocks in memory: the bytes of a file, of which those of 16 rows lie side by side.

So one instruction on 16 words does the same to 16 rows, and no sum goes across a vector.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from multicard.quantized.bits import Bytes
from multicard.quantized.scaled import type_of
from multicard.quantized.scaled import words as whole_words
from multicard.quantized.types import Bits, BlockType, Group

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
        return type_of(self.kind)

    @property
    def columns(self) -> int:
        return self.width * self.type.columns

    @property
    def padded(self) -> int:
        """Bytes that a block takes: a large one, whole words."""
        size = self.type.size
        return size if self.type.fields or size <= LARGE else size + -size % WORD

    @property
    def row_words(self) -> int:
        """Of a row, of which the last may have up to three bytes more than the row."""
        return sum(run.units * run.words for run in self.runs)

    @property
    def words(self) -> int:
        """Of all rows."""
        return self.rows * self.row_words

    @property
    def runs(self) -> list[Run]:
        """A row's blocks: as many together as fill whole words, one, two or four, and then perhaps a few more."""
        size = self.padded
        together = WORD // math.gcd(size, *self.type.fields, WORD)
        units, rest = divmod(self.width, together)
        words = together * size // WORD
        runs = [Run(together, units, 0, words)] if units else []
        return [*runs, Run(rest, 1, units * words, self._unit(rest) // WORD)] if rest else runs

    def _unit(self, together: int) -> int:
        """Bytes of a unit of so many blocks."""
        fields = self.type.fields
        return sum(whole_words(together * each) for each in (*fields, self.padded - sum(fields)))

    def in_words(self, raw: Tensor) -> Tensor:
        """Rows of a file's bytes, uint8 ``(rows, width, type.size)``, as int32 ``(rows, row_words)``."""
        beyond, first, found = self.padded - self.type.size, 0, []
        raw = F.pad(raw, (0, beyond)) if beyond else raw
        fields = self.type.fields
        for run in self.runs:
            count = run.together * run.units
            blocks = raw[:, first : first + count].unflatten(1, (run.units, run.together))
            first += count
            parts = [part.flatten(2) for part in blocks.split([*fields, self.padded - sum(fields)], -1)]
            found += [torch.cat([F.pad(part, (0, -part.shape[-1] % WORD)) for part in parts], -1).flatten(1)]
        return torch.cat(found, 1).view(torch.int32)

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

    def described(self, run: Run) -> tuple[int, int]:
        """How many descriptions of a unit's blocks there are, and of how many sections each is."""
        return (1, run.together * self.type.sections) if self.type.fields else (run.together, self.type.sections)

    def groups(self, bits: Bits, run: Run, number: int) -> list[Group]:
        """What the sections of a description hold, in the order of columns."""
        groups = self.type.groups
        assert groups is not None, f"{self.kind} has no blocks"
        return groups(bits, run.together if self.type.fields else number * self.padded)

    def values(self, words: Tensor) -> Tensor:
        """Numbers, float32 ``(rows, columns)``, from the words of whole rows, ``(rows, row_words)``."""
        found = [self._values(words, run) for run in self.runs]
        return torch.cat(found, 1) if len(found) > 1 else found[0]

    def _values(self, words: Tensor, run: Run) -> Tensor:
        """Those of a run."""
        raw = words[:, run.first : run.first + run.units * run.words].contiguous().view(torch.uint8)
        descriptions, sections = self.described(run)
        bits = Bytes(raw.view(len(words), run.units, run.words * WORD), sections)
        blocks = []
        for number in range(descriptions):
            parts = []
            for scale, codes, zero, minimum in self.groups(bits, run, number):
                part = codes.float()
                if isinstance(zero, Tensor):
                    part = part.sub_(zero.unsqueeze(-1))
                elif zero:
                    part = part.sub_(zero)
                part = part.mul_(scale.unsqueeze(-1))
                parts.append(part if minimum is None else part.add_(minimum.unsqueeze(-1)))
            blocks.append((torch.cat(parts, -1) if len(parts) > 1 else parts[0]).flatten(2))
        return (torch.stack(blocks, 2) if len(blocks) > 1 else blocks[0]).flatten(1)


def dequantize(kind: str, raw: Tensor) -> Tensor:
    """A file's bytes, uint8 ``(rows, width, size of a block)``, as float32 ``(rows, columns)``."""
    blocks = Blocks(kind, *raw.shape[:2])
    return blocks.values(blocks.in_words(raw))
