"""Blocks of any number of columns that are ``scale * (code - zero)``, as quantised checkpoints have them.

A block has a scale, perhaps a zero, and codes in sections. A type's name says all of it:
``U4x128-F16z`` has 128 unsigned codes of 4 bits, a float16 scale and a zero.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import torch
import torch.nn.functional as F
from torch import Tensor

from multicard.quantized.types import BLOCK_TYPES, Bits, BlockType, Codes, Group

SCALES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
WIDTHS = {"U2": 2, "U4": 4, "S8": 8, "E4M3": 8}
"""Bits of a code: unsigned; signed; float8_e4m3fn."""

PIECE = 32  # columns; a block that isn't a multiple of it is one piece
HEAD = 4  # bytes before the codes of a block that is kept by itself
LARGE = 64  # bytes of codes
LONG = 128  # columns: a block of more is several sections
NAME = re.compile(rf"({'|'.join(WIDTHS)})x(\d+)-({'|'.join(SCALES)})(z?)")


@dataclasses.dataclass(frozen=True)
class Scaled:
    """What a block holds.

    Attributes:
        codes: a key of WIDTHS.
        columns: numbers in a block; their bits fill whole words.
        scale: a key of SCALES.
        zero: a block has one; else it is 0 for signed codes and for floating-point ones, and half of the range for
            unsigned ones.
    """

    codes: str
    columns: int
    scale: str
    zero: bool

    @property
    def name(self) -> str:
        return f"{self.codes}x{self.columns}-{self.scale}{'z' if self.zero else ''}"

    @property
    def piece(self) -> int:
        """Columns whose codes are packed together."""
        return self.columns if self.columns % PIECE else PIECE

    @property
    def section(self) -> int:
        return self.columns if self.columns <= LONG or self.columns % PIECE else PIECE

    @property
    def fields(self) -> tuple[int, ...]:
        """Bytes of what is before the codes."""
        return (SCALES[self.scale].itemsize, *([1] if self.zero else []))

    @property
    def alone(self) -> bool:
        """A block with one more byte, to fill words, is less than 2% larger: it is kept by itself."""
        return sum(self.fields) == HEAD - 1 and self.columns * WIDTHS[self.codes] // 8 >= LARGE

    @property
    def type(self) -> BlockType:
        size = sum(self.fields) + self.columns * WIDTHS[self.codes] // 8
        if self.alone:
            return BlockType(self.name, self.columns, size + 1, self._alone, self.columns // self.piece)
        return BlockType(self.name, self.columns, size, self.groups, self.columns // self.section, self.fields)

    def groups(self, bits: Bits, blocks: int) -> list[Group]:
        scale, at = bits.numbers(0, SCALES[self.scale], blocks), words(blocks * self.fields[0])
        zero: int | Tensor = 1 << WIDTHS[self.codes] - 1 if self.codes[0] == "U" else 0
        if self.zero:
            zero = bits.numbers(at, torch.int8 if self.codes == "S8" else torch.uint8, blocks)
            at += words(blocks)
        size = self.piece * WIDTHS[self.codes] // 8
        pieces, sections = self.section // self.piece, blocks * self.columns // self.section
        step = size * pieces if sections > 1 else 0
        return [Group(scale, self._codes(bits, at + n * size, size, step), zero) for n in range(pieces)]

    def _alone(self, bits: Bits, at: int) -> list[Group]:
        scale, after = bits.numbers(at, SCALES[self.scale], 1), at + self.fields[0]
        zero = bits.signed(after) if self.codes == "S8" else bits.part(after, 0, 8)
        size = self.piece * WIDTHS[self.codes] // 8
        return [Group(scale, self._codes(bits, at + HEAD, size, size if self.piece < self.columns else 0), zero)]

    def _codes(self, bits: Bits, at: int, size: int, step: int) -> Codes:
        if self.codes == "E4M3":
            return bits.eighths(at, size, step)
        if self.codes == "S8":
            return bits.signed_all(at, size, step)
        parts = [bits.parts(at, size, shift, WIDTHS[self.codes], step) for shift in range(0, 8, WIDTHS[self.codes])]
        return functools.reduce(bits.join, parts)

    def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """Blocks, uint8 ``(rows, blocks, bytes)``; the last is filled with the code 0.

        Args:
            codes: their bits, uint8 ``(rows, columns)``.
            scales: of this type's dtype, ``(rows, blocks)``.
            zeros: their bits, uint8 ``(rows, blocks)``; None: this type has none.
        """
        rows, blocks = scales.shape
        codes = F.pad(codes, (0, blocks * self.columns - codes.shape[1])).view(rows, blocks, -1, self.piece)
        width = WIDTHS[self.codes]
        packed = codes
        if width < 8:
            parts = codes.chunk(8 // width, -1)
            packed = functools.reduce(torch.bitwise_or, [part << width * n for n, part in enumerate(parts)])
        heads = [scales.clone(memory_format=torch.contiguous_format).view(torch.uint8).view(rows, blocks, -1)]
        if zeros is not None:
            heads.append(zeros.unsqueeze(-1))
        if self.alone:
            heads.append(torch.zeros(rows, blocks, 1, dtype=torch.uint8))
        return torch.cat([*heads, packed.flatten(2)], -1)


def words(size: int) -> int:
    """So many bytes, or a few more, that fill words of four."""
    return size + -size % 4


@functools.cache
def type_of(kind: str) -> BlockType:
    """The type of blocks of that name."""
    if kind in BLOCK_TYPES:
        return BLOCK_TYPES[kind]
    match = NAME.fullmatch(kind)
    assert match is not None, f"{kind} is no type of blocks"
    codes, columns, scale, zero = match.groups()
    return Scaled(codes, int(columns), scale, zero == "z").type
