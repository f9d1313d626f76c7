"""Products with a matrix of blocks, and its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from multicard.quantized.bits import Words
from multicard.quantized.words import LANES, Blocks, Run

CHUNK = 1 << 18  # numbers that are taken out of blocks at a time, so that they stay in the processor's cache


def few_rows(blocks: Blocks, held: Tensor, vectors: Sequence[Tensor]) -> Tensor:
    """``x Aᵀ`` for a few vectors, float32 ``(blocks.columns,)`` each; ``(vectors, rows)``, float32. To be compiled.

    A group's scale is multiplied once, by the sum of codes times numbers of ``x``.
    """
    parts = []
    for tiles in blocks.tiles(held):
        sums = [_sum([_of_run(blocks, run, tiles, x) for run in blocks.runs]).flatten() for x in vectors]
        parts.append(torch.stack(sums))
    return torch.cat(parts, -1)


def _of_run(blocks: Blocks, run: Run, tiles: Tensor, x: Tensor) -> Tensor:
    """A run's part of the product, ``(tiles, lanes)``."""
    count, _, lanes = tiles.shape
    descriptions, sections = blocks.described(run)
    words = tiles[:, run.first : run.first + run.units * run.words].view(count, run.units, run.words, lanes)
    bits = Words(words, sections)
    width = run.together * blocks.type.columns  # of a unit
    x = (x[: run.units * width] if run.first == 0 else x[-width:]).view(run.units, descriptions, sections, -1)
    terms = []
    for number, block in enumerate(x.unbind(1)):
        column = 0
        for scale, codes, zero, minimum in blocks.groups(bits, run, number):
            here = block[..., column : column + len(codes.columns)]
            product = _sum([code.float() * here[..., n, None] for n, code in enumerate(codes.columns)])
            shifted = isinstance(zero, Tensor) or zero != 0
            terms.append(scale * (product - zero * here.sum(-1, keepdim=True) if shifted else product))
            if minimum is not None:
                terms.append(minimum * here.sum(-1, keepdim=True))
            column += len(codes.columns)
    return _sum(terms).sum((1, 2))


def _sum(terms: list[Tensor]) -> Tensor:
    """By halves: one after the other, additions would wait for each other, and rounding errors would add up."""
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)] + terms[len(terms) & ~1 :]
    return terms[0]


def in_chunks(blocks: Blocks, held: Tensor) -> Iterator[Tensor]:
    """The matrix in float32, some rows at a time, ``(some, blocks.columns)``."""
    for tiles in blocks.tiles(held):
        for some in tiles.split(max(1, CHUNK // (tiles.shape[-1] * blocks.columns))):
            yield blocks.values(some.transpose(1, 2).flatten(0, 1))


def lookup(blocks: Blocks, held: Tensor, rows: Tensor) -> Tensor:
    """Rows of the matrix by number, float32 ``(..., blocks.columns)``."""
    rest, per_row = blocks.rows % LANES, blocks.row_words
    full = blocks.rows - rest
    lanes = torch.where(rows < full, LANES, rest)
    inside = torch.where(rows < full, rows % LANES, rows - full)
    start = (rows - inside) * per_row + inside
    places = start.unsqueeze(-1) + lanes.unsqueeze(-1) * torch.arange(per_row, device=rows.device)
    return blocks.values(held[places].view(-1, per_row)).view(*rows.shape, blocks.columns)
