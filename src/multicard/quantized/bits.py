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

    def signed_all(self, at: int, columns: int) -> Tensor:
        return self._bytes(at, columns, 0).view(torch.int8)

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
        """From normal numbers only: compiled code may take others for 0."""
        bits = self.part(at, 0, 16)
        exponent, significand = (bits >> 10) & 31, bits & 1023
        normal = exponent.clamp(max=1)
        power = ((exponent - normal + 1 + 127 - 25) << 23).view(torch.float32)
        size = (significand + (normal << 10)).float() * power
        return torch.where(bits > 0x7FFF, -size, size)

    def word(self, at: int) -> Tensor:
        return self._word(at, 0)

    def part(self, at: int, shift: Shift, count: int, step: int = 0) -> Tensor:
        return (self._word(at, step) >> (8 * (at % 4) + shift)) & ((1 << count) - 1)

    def signed(self, at: int, step: int = 0) -> Tensor:
        return (self._word(at, step) << (24 - 8 * (at % 4))) >> 24

    def parts(self, at: int, columns: int, shift: Shift, count: int, step: int = 0) -> Lanes:
        return Lanes(self.part(at + n, shift, count, step) for n in range(columns))

    def signed_all(self, at: int, columns: int) -> Lanes:
        return Lanes(self.signed(at + n) for n in range(columns))

    def single(self, at: int, columns: int) -> Lanes:
        return Lanes(self.part(at + n // 8, n % 8, 1) for n in range(columns))

    def join(self, first: Lanes, second: Lanes) -> Lanes:
        return Lanes([*first.columns, *second.columns])

    def _word(self, at: int, step: int) -> Tensor:
        """The word that byte ``at`` is in; with a ``step``, one for each section."""
        word, apart = at // 4, step // 4
        last = word + (self._sections - 1) * apart
        return self._words[:, :, word : last + 1 : max(1, apart)]
