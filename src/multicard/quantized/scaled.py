"""Blocks of any number of columns that are ``scale * (code - zero)``, as quantised checkpoints have them.

A block begins with its scale, then the zero if there is one, then codes in sections. A type's name says all of it:
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

SECTION = 32  # columns; a block that isn't a multiple of it is one section
MANY = 64  # bytes of a block to which one more, which makes it even, is less than 2%
NAME = re.compile(rf"({'|'.join(WIDTHS)})x(\d+)-({'|'.join(SCALES)})(z?)")


@dataclasses.dataclass(frozen=True)
class Scaled:
    """What a block holds.

    Attributes:
        codes: a key of WIDTHS.
        columns: numbers in a block; their bits fill whole bytes.
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
    def section(self) -> int:
        return self.columns if self.columns % SECTION else SECTION

    @property
    def header(self) -> int:
        """Bytes before the codes."""
        size = SCALES[self.scale].itemsize + self.zero
        long = self.columns * WIDTHS[self.codes] // 8 + size > MANY
        return size + size % 2 if long else size

    @property
    def type(self) -> BlockType:
        size = self.header + self.columns * WIDTHS[self.codes] // 8
        return BlockType(self.name, self.columns, size, self.groups, self.columns // self.section, tight=True)

    def groups(self, bits: Bits, at: int) -> list[Group]:
        scale, after = bits.number(at, SCALES[self.scale]), at + SCALES[self.scale].itemsize
        zero: int | Tensor = 1 << WIDTHS[self.codes] - 1 if self.codes[0] == "U" else 0
        if self.zero:
            zero = bits.signed(after) if self.codes == "S8" else bits.part(after, 0, 8)
        return [Group(scale, self._codes(bits, at + self.header), zero)]

    def _codes(self, bits: Bits, at: int) -> Codes:
        width = WIDTHS[self.codes]
        size = self.section * width // 8
        step = size if self.section < self.columns else 0
        if self.codes == "E4M3":
            return bits.eighths(at, size, step)
        if self.codes == "S8":
            return bits.signed_all(at, size, step)
        parts = [bits.parts(at, size, shift, width, step) for shift in range(0, 8, width)]
        return functools.reduce(bits.join, parts)

    def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """Blocks, uint8 ``(rows, blocks, bytes)``; the last is filled with the code 0.

        Args:
            codes: their bits, uint8 ``(rows, columns)``.
            scales: of this type's dtype, ``(rows, blocks)``.
            zeros: their bits, uint8 ``(rows, blocks)``; None: this type has none.
        """
        rows, blocks = scales.shape
        codes = F.pad(codes, (0, blocks * self.columns - codes.shape[1])).view(rows, blocks, -1, self.section)
        width = WIDTHS[self.codes]
        packed = codes
        if width < 8:
            parts = codes.chunk(8 // width, -1)
            packed = functools.reduce(torch.bitwise_or, [part << width * n for n, part in enumerate(parts)])
        heads = [scales.clone(memory_format=torch.contiguous_format).view(torch.uint8).view(rows, blocks, -1)]
        if zeros is not None:
            heads.append(zeros.unsqueeze(-1))
        head = torch.cat(heads, -1)
        return torch.cat([F.pad(head, (0, self.header - head.shape[-1])), packed.flatten(2)], -1)


@functools.cache
def type_of(kind: str) -> BlockType:
    """The type of blocks of that name."""
    if kind in BLOCK_TYPES:
        return BLOCK_TYPES[kind]
    match = NAME.fullmatch(kind)
    assert match is not None, f"{kind} is no type of blocks"
    codes, columns, scale, zero = match.groups()
    return Scaled(codes, int(columns), scale, zero == "z").type
