"""How numbers are packed into blocks of bits, by the names that GGUF files have for them.

A block is some columns of one row of a matrix. Its bytes are read as little-endian words of 32 bits, and everything is
taken out of these by shifts: an operation on integers serves a row, a tile of rows and a compiled kernel alike.
The layouts are those of ggml (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Group(NamedTuple):
    """Adjacent columns with one scale: their numbers are ``scale * (code - zero) + minimum``, float32.

    Attributes:
        codes: whole numbers, one tensor for each column.
        minimum: None: 0.
    """

    scale: Tensor
    codes: list[Tensor]
    zero: int = 0
    minimum: Tensor | None = None


class Bits:
    """What is in blocks: one tensor of int32 for each of a block's words, all of the same shape."""

    def __init__(self, words: Sequence[Tensor]) -> None:
        self._words = words

    def take(self, at: int, count: int) -> Tensor:
        """``count`` bits from bit ``at`` on, inside one word, as a whole number from 0 on."""
        word, shift = divmod(at, 32)
        return (self._words[word] >> shift) & ((1 << count) - 1)

    def signed(self, byte: int) -> Tensor:
        """Byte ``byte``, -128 to 127."""
        word, place = divmod(byte, 4)
        return (self._words[word] << (24 - 8 * place)) >> 24

    def half(self, byte: int) -> Tensor:
        """The finite float16 at byte ``byte``, in float32, from normal numbers only: compiled code may drop others."""
        bits = self.take(8 * byte, 16)
        exponent, significand = (bits >> 10) & 31, bits & 1023
        normal = exponent.clamp(max=1)
        power = ((exponent - normal + 1 + 127 - 25) << 23).view(torch.float32)
        size = (significand + (normal << 10)).float() * power
        return torch.where(bits > 0x7FFF, -size, size)


@dataclasses.dataclass(frozen=True)
class BlockType:
    """How a block's numbers are packed.

    Attributes:
        name: in GGUF files.
        columns: numbers in a block.
        size: bytes of a block.
        groups: the block's columns in order, given bits and the byte where it begins; None: one plain number.
    """

    name: str
    columns: int
    size: int
    groups: Callable[[Bits, int], list[Group]] | None = dataclasses.field(default=None, compare=False, repr=False)


def _q4_0(bits: Bits, at: int) -> list[Group]:
    return [Group(bits.half(at), _nibbles(bits, at + 2, 16), zero=8)]


def _q4_1(bits: Bits, at: int) -> list[Group]:
    return [Group(bits.half(at), _nibbles(bits, at + 4, 16), minimum=bits.half(at + 2))]


def _q5_0(bits: Bits, at: int) -> list[Group]:
    return [Group(bits.half(at), _fifth(_nibbles(bits, at + 6, 16), bits, at + 2), zero=16)]


def _q5_1(bits: Bits, at: int) -> list[Group]:
    return [Group(bits.half(at), _fifth(_nibbles(bits, at + 8, 16), bits, at + 4), minimum=bits.half(at + 2))]


def _q8_0(bits: Bits, at: int) -> list[Group]:
    return [Group(bits.half(at), [bits.signed(at + 2 + column) for column in range(32)])]


def _q2_k(bits: Bits, at: int) -> list[Group]:
    scale, least = bits.half(at + 80), bits.half(at + 82)
    groups = []
    for number in range(16):
        first = 8 * (at + 16 + 32 * (number // 8) + 16 * (number % 2)) + 2 * (number % 8 // 2)
        codes = [bits.take(first + 8 * column, 2) for column in range(16)]
        low, high = bits.take(8 * (at + number), 4), bits.take(8 * (at + number) + 4, 4)
        groups.append(Group(scale * low, codes, minimum=-least * high))
    return groups


def _q3_k(bits: Bits, at: int) -> list[Group]:
    scale = bits.half(at + 108)
    groups = []
    for number in range(16):
        half, pair, quarter = number // 8, number % 2, number % 8 // 2
        low = 8 * (at + 32 + 32 * half + 16 * pair) + 2 * quarter
        high = 8 * (at + 16 * pair) + 4 * half + quarter
        codes = [bits.take(low + 8 * n, 2) + 4 * bits.take(high + 8 * n, 1) for n in range(16)]
        sixteenth = bits.take(8 * (at + 96 + number % 8) + 4 * (number // 8), 4)
        factor = sixteenth + 16 * bits.take(8 * (at + 104 + number % 4) + 2 * (number // 4), 2) - 32
        groups.append(Group(scale * factor, codes, zero=4))
    return groups


def _q4_k(bits: Bits, at: int) -> list[Group]:
    scale, least = bits.half(at), bits.half(at + 2)
    groups = []
    for number in range(8):
        factor, below = _six_bits(bits, at + 4, number)
        first = 8 * (at + 16 + 32 * (number // 2)) + 4 * (number % 2)
        codes = [bits.take(first + 8 * column, 4) for column in range(32)]
        groups.append(Group(scale * factor, codes, minimum=-least * below))
    return groups


def _q5_k(bits: Bits, at: int) -> list[Group]:
    scale, least = bits.half(at), bits.half(at + 2)
    groups = []
    for number in range(8):
        factor, below = _six_bits(bits, at + 4, number)
        low, high = 8 * (at + 48 + 32 * (number // 2)) + 4 * (number % 2), 8 * (at + 16) + number
        codes = [bits.take(low + 8 * n, 4) + 16 * bits.take(high + 8 * n, 1) for n in range(32)]
        groups.append(Group(scale * factor, codes, minimum=-least * below))
    return groups


def _q6_k(bits: Bits, at: int) -> list[Group]:
    scale = bits.half(at + 208)
    groups = []
    for number in range(16):
        half, quarter, pair = number // 8, number % 8 // 2, number % 2
        low = 8 * (at + 64 * half + 32 * (quarter % 2) + 16 * pair) + 4 * (quarter // 2)
        high = 8 * (at + 128 + 32 * half + 16 * pair) + 2 * quarter
        codes = [bits.take(low + 8 * n, 4) + 16 * bits.take(high + 8 * n, 2) for n in range(16)]
        groups.append(Group(scale * bits.signed(at + 192 + number), codes, zero=32))
    return groups


def _nibbles(bits: Bits, at: int, count: int) -> list[Tensor]:
    """The low halves of ``count`` bytes, then the high ones."""
    return [bits.take(8 * (at + byte) + side, 4) for side in (0, 4) for byte in range(count)]


def _fifth(codes: list[Tensor], bits: Bits, at: int) -> list[Tensor]:
    """Codes with a fifth bit each, from byte ``at`` on."""
    return [code + 16 * bits.take(8 * (at + n // 8) + n % 8, 1) for n, code in enumerate(codes)]


def _six_bits(bits: Bits, at: int, number: int) -> tuple[Tensor, Tensor]:
    """A group's factors of the scale and the minimum: 16 numbers of six bits in 12 bytes."""
    if number < 4:
        return bits.take(8 * (at + number), 6), bits.take(8 * (at + number + 4), 6)
    last = 8 * (at + number + 4)
    return (
        bits.take(last, 4) + 16 * bits.take(8 * (at + number - 4) + 6, 2),
        bits.take(last + 4, 4) + 16 * bits.take(8 * (at + number) + 6, 2),
    )


BLOCK_TYPES = {
    each.name: each
    for each in (
        BlockType("Q4_0", 32, 18, _q4_0),
        BlockType("Q4_1", 32, 20, _q4_1),
        BlockType("Q5_0", 32, 22, _q5_0),
        BlockType("Q5_1", 32, 24, _q5_1),
        BlockType("Q8_0", 32, 34, _q8_0),
        BlockType("Q2_K", 256, 84, _q2_k),
        BlockType("Q3_K", 256, 110, _q3_k),
        BlockType("Q4_K", 256, 144, _q4_k),
        BlockType("Q5_K", 256, 176, _q5_k),
        BlockType("Q6_K", 256, 210, _q6_k),
    )
}
