"""Taking numbers out of blocks: from an array of their bytes, and from words of 32 bits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Bytes:
    """Blocks as little-endian bytes, uint8 ``(..., bytes)``; columns are a last dimension."""

    def __init__(self, raw: Tensor) -> None:
        self._raw = raw

    def half(self, at: int) -> Tensor:
        return self._raw[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1).float()

    def part(self, at: int, shift: int, count: int) -> Tensor:
        return _part(self._raw[..., at], shift, count)

    def signed(self, at: int) -> Tensor:
        return self._raw[..., at].view(torch.int8)

    def parts(self, at: int, columns: int, shift: int, count: int) -> Tensor:
        return _part(self._raw[..., at : at + columns], shift, count)

    def signed_all(self, at: int, columns: int) -> Tensor:
        return self._raw[..., at : at + columns].view(torch.int8)

    def single(self, at: int, columns: int) -> Tensor:
        places = torch.arange(8, dtype=torch.uint8, device=self._raw.device)
        return (self._raw[..., at : at + columns // 8, None] >> places & 1).flatten(-2)

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first, second], -1)


def _part(raw: Tensor, shift: int, count: int) -> Tensor:
    shifted = raw >> shift if shift else raw
    return shifted & ((1 << count) - 1) if shift + count < 8 else shifted


class Lanes:
    """One tensor for each column, with the operations of tensors that decoding needs."""

    def __init__(self, columns: Iterable[Tensor]) -> None:
        self.columns = list(columns)

    def __add__(self, other: Lanes) -> Lanes:
        return Lanes(a + b for a, b in zip(self.columns, other.columns, strict=True))

    def __mul__(self, factor: int) -> Lanes:
        return Lanes(each * factor for each in self.columns)


class Words:
    """Blocks as one int32 tensor for each word, all of one shape: what serves a word serves a vector of rows."""

    def __init__(self, words: Sequence[Tensor]) -> None:
        self._words = words

    def half(self, at: int) -> Tensor:
        """From normal numbers only: compiled code may take others for 0."""
        bits = self._take(8 * at, 16)
        exponent, significand = (bits >> 10) & 31, bits & 1023
        normal = exponent.clamp(max=1)
        power = ((exponent - normal + 1 + 127 - 25) << 23).view(torch.float32)
        size = (significand + (normal << 10)).float() * power
        return torch.where(bits > 0x7FFF, -size, size)

    def part(self, at: int, shift: int, count: int) -> Tensor:
        return self._take(8 * at + shift, count)

    def signed(self, at: int) -> Tensor:
        word, place = divmod(at, 4)
        return (self._words[word] << (24 - 8 * place)) >> 24

    def parts(self, at: int, columns: int, shift: int, count: int) -> Lanes:
        return Lanes(self.part(at + n, shift, count) for n in range(columns))

    def signed_all(self, at: int, columns: int) -> Lanes:
        return Lanes(self.signed(at + n) for n in range(columns))

    def single(self, at: int, columns: int) -> Lanes:
        return Lanes(self._take(8 * at + n, 1) for n in range(columns))

    def join(self, first: Lanes, second: Lanes) -> Lanes:
        return Lanes([*first.columns, *second.columns])

    def _take(self, at: int, count: int) -> Tensor:
        """``count`` bits from bit ``at`` on, inside one word."""
        word, shift = divmod(at, 32)
        return (self._words[word] >> shift) & ((1 << count) - 1)
