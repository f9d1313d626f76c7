"""Taking numbers out of blocks: from an array of their bytes, and from words of 32 bits."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from multicard.quantized.types import Shift


class Bytes:
    """Blocks as little-endian bytes, uint8 ``(..., bytes)``.

    What is taken out has the shape ``(..., 1 or sections)``, and columns are one more dimension.
    """

    def __init__(self, raw: Tensor, sections: int) -> None:
        self._raw, self._sections = raw, sections

    @property
    def section(self) -> Tensor:
        return torch.arange(self._sections, dtype=torch.int32, device=self._raw.device)

    def half(self, at: int) -> Tensor:
        return self._raw[..., at : at + 2].contiguous().view(torch.float16).float()

    def numbers(self, at: int, dtype: torch.dtype, count: int) -> Tensor:
        copy = self._raw[..., at : at + count * dtype.itemsize].clone(memory_format=torch.contiguous_format)
        return copy.view(dtype).float().repeat_interleave(self._sections // count, -1)

    def word(self, at: int) -> Tensor:
        return self._raw[..., at : at + 4].contiguous().view(torch.int32)

    def part(self, at: int, shift: Shift, count: int, step: int = 0) -> Tensor:
        return self.parts(at, 1, shift, count, step).squeeze(-1)

    def signed(self, at: int, step: int = 0) -> Tensor:
        return self._bytes(at, 1, step).squeeze(-1).view(torch.int8)

    def parts(self, at: int, columns: int, shift: Shift, count: int, step: int = 0) -> Tensor:
        raw = self._bytes(at, columns, step)
        if isinstance(shift, Tensor):
            return (raw >> shift.to(torch.uint8).unsqueeze(-1)) & ((1 << count) - 1)
        shifted = raw >> shift if shift else raw
        return shifted & ((1 << count) - 1) if shift + count < 8 else shifted

    def signed_all(self, at: int, columns: int, step: int = 0) -> Tensor:
        return self._bytes(at, columns, step).view(torch.int8)

    def eighths(self, at: int, columns: int, step: int = 0) -> Tensor:
        return self._bytes(at, columns, step).view(torch.float8_e4m3fn)

    def single(self, at: int, columns: int) -> Tensor:
        places = torch.arange(8, dtype=torch.uint8, device=self._raw.device)
        return (self._bytes(at, columns // 8, 0).unsqueeze(-1) >> places & 1).flatten(-2)

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first, second], -1)

    def _bytes(self, at: int, count: int, step: int) -> Tensor:
        """``(..., 1 or sections, count)``."""
        if step == 0:
            return self._raw[..., None, at : at + count]
        return self._raw[..., at:].unfold(-1, count, step)[..., : self._sections, :]


class Lanes:
    """One tensor for each column, with the operations of tensors that decoding needs."""

    def __init__(self, columns: Iterable[Tensor]) -> None:
        self.columns = list(columns)

    def __add__(self, other: Lanes) -> Lanes:
        return Lanes(a + b for a, b in zip(self.columns, other.columns, strict=True))

    def __mul__(self, factor: int) -> Lanes:
        return Lanes(each * factor for each in self.columns)


class Words:
    """Blocks as words, int32 ``(tiles, units, words, lanes)``: what serves a word serves a vector of rows.

    What is taken out has the shape ``(tiles, units, 1 or sections, lanes)``.
    """

    def __init__(self, words: Tensor, sections: int) -> None:
        self._words, self._sections = words, sections

    @property
    def section(self) -> Tensor:
        return torch.arange(self._sections, dtype=torch.int32, device=self._words.device).unsqueeze(-1)

    def half(self, at: int) -> Tensor:
        return _half(self.part(at, 0, 16))

    def numbers(self, at: int, dtype: torch.dtype, count: int) -> Tensor:
        size = dtype.itemsize
        held = 4 // size  # numbers of a word
        words = self._words[:, :, at // 4 : at // 4 - -count // held]
        shifts = 8 * size * torch.arange(held, dtype=torch.int32, device=words.device).unsqueeze(-1)
        found = (words.unsqueeze(3) >> shifts).flatten(2, 3)[:, :, :count]
        each = self._sections // count
        found = found.unsqueeze(3).expand(-1, -1, -1, each, -1).flatten(2, 3)
        if dtype == torch.float16:
            return _half(found & 0xFFFF)
        if dtype in (torch.bfloat16, torch.float32):
            return (found if size == 4 else found << 16).view(torch.float32)
        return found & 255 if dtype == torch.uint8 else (found << 24) >> 24

    def word(self, at: int) -> Tensor:
        return self._word(at, 0)

    def part(self, at: int, shift: Shift, count: int, step: int = 0) -> Tensor:
        return (self._word(at, step) >> (8 * (at % 4) + shift)) & ((1 << count) - 1)

    def signed(self, at: int, step: int = 0) -> Tensor:
        return (self._word(at, step) << (24 - 8 * (at % 4))) >> 24

    def parts(self, at: int, columns: int, shift: Shift, count: int, step: int = 0) -> Lanes:
        return Lanes(self.part(at + n, shift, count, step) for n in range(columns))

    def signed_all(self, at: int, columns: int, step: int = 0) -> Lanes:
        return Lanes(self.signed(at + n, step) for n in range(columns))

    def eighths(self, at: int, columns: int, step: int = 0) -> Lanes:
        return Lanes(self._eighth(at + n, step) for n in range(columns))

    def single(self, at: int, columns: int) -> Lanes:
        return Lanes(self.part(at + n // 8, n % 8, 1) for n in range(columns))

    def join(self, first: Lanes, second: Lanes) -> Lanes:
        return Lanes([*first.columns, *second.columns])

    def _eighth(self, at: int, step: int) -> Tensor:
        """A float8_e4m3fn, by normal numbers only.

        With three bits of significand and four of exponent moved to where float32 has them, and the exponent's bias
        exchanged, ``t`` is the number's size; if the exponent is 0, the size is ``2 t - 2**-6`` instead, which is less.
        """
        word, place = self._word(at, step), 8 * (at % 4)
        size = word << (20 - place) if place <= 20 else word >> (place - 20)
        t = ((size & 0x07F00000) + (120 << 23)).view(torch.float32)
        t = torch.where(t < 2**-6, 2 * t - 2**-6, t)
        sign = (word << (24 - place)) & -(1 << 31)
        return (t.view(torch.int32) | sign).view(torch.float32)

    def _word(self, at: int, step: int) -> Tensor:
        """The word that byte ``at`` is in; with a ``step``, one for each section."""
        word, apart = at // 4, step // 4
        last = word + (self._sections - 1) * apart
        return self._words[:, :, word : last + 1 : max(1, apart)]


def _half(bits: Tensor) -> Tensor:
    """Float16 in float32, from normal numbers only: compiled code may take others for 0."""
    exponent, significand = (bits >> 10) & 31, bits & 1023
    normal = exponent.clamp(max=1)
    power = ((exponent - normal + 1 + 127 - 25) << 23).view(torch.float32)
    size = (significand + (normal << 10)).float() * power
    return torch.where(bits > 0x7FFF, -size, size)
