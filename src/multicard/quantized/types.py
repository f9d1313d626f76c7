"""How numbers are packed into blocks of bits, by the names that GGUF files have for them.

A block is some columns of one row of a matrix. What its bytes mean is said once here, in terms of :class:`Bits`, and
served in two ways: an array of bytes for library kernels, and words of 32 bits for compiled code.
The layouts are those of ggml (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Codes = Any
"""Whole numbers of adjacent columns: a tensor whose last dimension they are, or :class:`~.bits.Lanes`."""

Shift = int | Tensor
"""A number of bits, or one for each section."""


class Group(NamedTuple):
    """Adjacent columns with one scale: their numbers are ``scale * (code - zero) + minimum``, float32.

    Attributes:
        minimum: None: 0.
    """

    scale: Tensor
    codes: Codes
    zero: int | Tensor = 0
    minimum: Tensor | None = None


class Bits(Protocol):
    """The bytes of blocks, in two implementations (:mod:`multicard.quantized.bits`).

    A block of several alike sections is described once: ``section`` is their number 0, 1, ..., along a dimension of its
    own, and ``step`` is by how many bytes, a multiple of 4, a section's are further on than the one's before.
    """

    @property
    def section(self) -> Tensor:
        """The numbers of sections, int32."""

    def half(self, at: int) -> Tensor:
        """The finite float16 at byte ``at``, in float32."""

    def numbers(self, at: int, dtype: torch.dtype, count: int) -> Tensor:
        """So many adjacent numbers from byte ``at`` on, a multiple of 4, each for as many of all sections.

        Args:
            dtype: float16, bfloat16 or float32, finite; uint8; int8.
        """

    def word(self, at: int) -> Tensor:
        """Bytes ``at`` to ``at + 3``, ``at`` a multiple of 4, as int32."""

    def part(self, at: int, shift: Shift, count: int, step: int = 0) -> Tensor:
        """``count`` bits of byte ``at`` from bit ``shift`` on, as a whole number from 0 on."""

    def signed(self, at: int, step: int = 0) -> Tensor:
        """Byte ``at``, -128 to 127."""

    def parts(self, at: int, columns: int, shift: Shift, count: int, step: int = 0) -> Codes:
        """:meth:`part` of so many adjacent bytes, one for each column."""

    def signed_all(self, at: int, columns: int, step: int = 0) -> Codes:
        """:meth:`signed` of so many adjacent bytes, one for each column."""

    def eighths(self, at: int, columns: int, step: int = 0) -> Codes:
        """So many adjacent float8_e4m3fn, none of them NaN, one for each column."""

    def single(self, at: int, columns: int) -> Codes:
        """Adjacent single bits, the lowest of byte ``at`` first, one for each column."""

    def join(self, first: Codes, second: Codes) -> Codes:
        """The columns of both, one after the other."""


@dataclasses.dataclass(frozen=True)
class BlockType:
    """How a block's numbers are packed.

    Attributes:
        name: in GGUF files.
        columns: numbers in a block.
        size: bytes of a block.
        groups: a section's columns in order, given bits and the byte where the block begins; None: one plain number.
        sections: of a block, with equally many columns.
        fields: bytes of each number that a block begins with; in memory, several blocks' first fields come first, then
            their second ones, then codes, each from a word on. ``groups`` is then given how many blocks these are, and
            describes all of their sections. Empty: blocks stay as they are.
    """

    name: str
    columns: int
    size: int
    groups: Callable[[Bits, int], list[Group]] | None = dataclasses.field(default=None, compare=False, repr=False)
    sections: int = 1
    fields: tuple[int, ...] = ()


def _q4_0(bits: Bits, at: int) -> list[Group]:
    return [Group(bits.half(at), _nibbles(bits, at + 2), zero=8)]


def _q4_1(bits: Bits, at: int) -> list[Group]:
    return [Group(bits.half(at), _nibbles(bits, at + 4), minimum=bits.half(at + 2))]


def _q5_0(bits: Bits, at: int) -> list[Group]:
    return [Group(bits.half(at), _nibbles(bits, at + 6) + bits.single(at + 2, 32) * 16, zero=16)]


def _q5_1(bits: Bits, at: int) -> list[Group]:
    codes = _nibbles(bits, at + 8) + bits.single(at + 4, 32) * 16
    return [Group(bits.half(at), codes, minimum=bits.half(at + 2))]


def _q8_0(bits: Bits, at: int) -> list[Group]:
    return [Group(bits.half(at), bits.signed_all(at + 2, 32))]


def _q2_k(bits: Bits, at: int) -> list[Group]:
    """Sections of 128 columns, in four quarters of two groups of 16, as those of Q3_K and Q6_K."""
    scale, least = bits.half(at + 80), bits.half(at + 82)
    groups = []
    for number in range(8):
        quarter, pair = divmod(number, 2)
        codes = bits.parts(at + 16 + 16 * pair, 16, 2 * quarter, 2, step=32)
        factor, below = bits.part(at + number, 0, 4, step=8), bits.part(at + number, 4, 4, step=8)
        groups.append(Group(scale * factor, codes, minimum=-least * below))
    return groups


def _q3_k(bits: Bits, at: int) -> list[Group]:
    scale, half = bits.half(at + 108), 4 * bits.section
    groups = []
    for number in range(8):
        quarter, pair = divmod(number, 2)
        low = bits.parts(at + 32 + 16 * pair, 16, 2 * quarter, 2, step=32)
        high = bits.parts(at + 16 * pair, 16, half + quarter, 1)
        factor = bits.part(at + 96 + number, half, 4)
        factor = factor + 16 * bits.part(at + 104 + number % 4, half + 2 * (number // 4), 2)
        groups.append(Group(scale * (factor.float() - 32), low + high * 4, zero=4))
    return groups


def _q4_k(bits: Bits, at: int) -> list[Group]:
    """Sections of 64 columns: the low halves of 32 bytes, and the high ones."""
    scale, least = bits.half(at), bits.half(at + 2)
    groups = []
    for side in (0, 1):
        codes = bits.parts(at + 16, 32, 4 * side, 4, step=32)
        factor, below = _six_bits(bits, at + 4, side)
        groups.append(Group(scale * factor, codes, minimum=-least * below))
    return groups


def _q5_k(bits: Bits, at: int) -> list[Group]:
    scale, least = bits.half(at), bits.half(at + 2)
    groups = []
    for side in (0, 1):
        low = bits.parts(at + 48, 32, 4 * side, 4, step=32)
        codes = low + bits.parts(at + 16, 32, 2 * bits.section + side, 1) * 16
        factor, below = _six_bits(bits, at + 4, side)
        groups.append(Group(scale * factor, codes, minimum=-least * below))
    return groups


def _q6_k(bits: Bits, at: int) -> list[Group]:
    scale = bits.half(at + 208)
    groups = []
    for number in range(8):
        quarter, pair = divmod(number, 2)
        low = bits.parts(at + 32 * (quarter % 2) + 16 * pair, 16, 4 * (quarter // 2), 4, step=64)
        codes = low + bits.parts(at + 128 + 16 * pair, 16, 2 * quarter, 2, step=32) * 16
        groups.append(Group(scale * bits.signed(at + 192 + number, step=8), codes, zero=32))
    return groups


def _nibbles(bits: Bits, at: int) -> Codes:
    """The low halves of 16 bytes, then the high ones."""
    return bits.join(bits.parts(at, 16, 0, 4), bits.parts(at, 16, 4, 4))


def _six_bits(bits: Bits, at: int, side: int) -> tuple[Tensor, Tensor]:
    """A group's factors of the scale and the minimum: 16 numbers of six bits in three words.

    Those of the first four groups are the low six bits of the bytes of two words. Of the others the low four are in the
    third word, and the high two at the top of the first two.
    """
    first, second, third = bits.word(at), bits.word(at + 4), bits.word(at + 8)
    early, place = bits.section < 2, 16 * (bits.section % 2) + 8 * side
    top = place + 6
    return (
        torch.where(early, (first >> place) & 63, ((third >> place) & 15) + 16 * ((first >> top) & 3)),
        torch.where(early, (second >> place) & 63, ((third >> (place + 4)) & 15) + 16 * ((second >> top) & 3)),
    )


BLOCK_TYPES = {
    each.name: each
    for each in (
        BlockType("Q4_0", 32, 18, _q4_0),
        BlockType("Q4_1", 32, 20, _q4_1),
        BlockType("Q5_0", 32, 22, _q5_0),
        BlockType("Q5_1", 32, 24, _q5_1),
        BlockType("Q8_0", 32, 34, _q8_0),
        BlockType("Q2_K", 256, 84, _q2_k, sections=2),
        BlockType("Q3_K", 256, 110, _q3_k, sections=2),
        BlockType("Q4_K", 256, 144, _q4_k, sections=4),
        BlockType("Q5_K", 256, 176, _q5_k, sections=4),
        BlockType("Q6_K", 256, 210, _q6_k, sections=2),
    )
}
