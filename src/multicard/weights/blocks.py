"""Weights that stay in the blocks of a file: what this rank's part of one is, and reading it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from multicard import partition
from multicard.layers.shard import Shard, Spans, count, shard_of
from multicard.quantized.rounding import to_blocks
from multicard.quantized.types import BLOCK_TYPES, BlockType
from multicard.quantized.weight import BlockWeight, declare_blocks, hold
from multicard.quantized.words import LANES, Blocks
from multicard.weights.gguf.files import GGUFFiles
from multicard.weights.source import Plain, Reader, Shapes, Source

PIECE = 4 << 20  # bytes of blocks that are read at a time
ROUNDED = 1 << 24  # numbers that are held in float32 at a time while they are rounded


@dataclasses.dataclass(frozen=True)
class InBlocks:
    """The source of a parameter in blocks: those of ``plain``, as they are.

    Attributes:
        slices: for each part of the weight, tensors and their spans.
    """

    plain: Plain
    weight: BlockWeight
    slices: tuple[tuple[tuple[str, Spans], ...], ...]

    def shapes(self, shard: Shard) -> Shapes:
        return self.plain.shapes(shard)

    def fill(self, reader: Reader, name: str, shard: Shard, out: Tensor) -> None:
        """Read this rank's blocks into ``out``, int32 of one dimension, some rows at a time."""
        at = 0
        for part, slices in zip(self.weight.parts, self.slices, strict=True):
            rest = torch.empty(0, part.width, part.type.size, dtype=torch.uint8)
            for raw in self._pieces(reader, shard, part, slices):
                reader.staging = max(reader.staging, 3 * raw.nbytes)  # as read, in order, and in words
                raw = torch.cat([rest, raw]) if len(rest) else raw
                full = len(raw) - len(raw) % LANES
                at = _put(part, raw[:full], out, at)
                rest = raw[full:].clone()
            at = _put(part, rest, out, at)

    def _pieces(
        self, reader: Reader, shard: Shard, part: Blocks, slices: Sequence[tuple[str, Spans]]
    ) -> Iterator[Tensor]:
        """The blocks of a part's rows in order, about PIECE bytes at a time, uint8 ``(some, width, size)``."""
        unit = math.lcm(LANES, self.plain.together)
        height = max(1, PIECE // (part.width * part.type.size) // unit) * unit
        for key, spans in slices:
            lines, columns = (spans, range(shard.shape[1])) if shard.dim == 0 else ((range(part.rows),), spans[0])
            for some in partition.chunks(lines, height):
                raw = torch.cat([reader.blocks(key, span, columns) for span in some])
                yield self.plain.in_order(key, raw) if shard.dim == 0 else raw


def _put(part: Blocks, raw: Tensor, out: Tensor, at: int) -> int:
    """Put rows of a part into ``out`` from word ``at`` on; returns the word after them."""
    rows = dataclasses.replace(part, rows=len(raw))
    rows.interleave(raw, out[at : at + rows.words])
    return at + rows.words


def in_blocks(files: GGUFFiles, plain: Plain, shard: Shard, dtype: torch.dtype) -> InBlocks | None:
    """This rank's part of a weight in blocks; None where that can't be: a part is stored as plain numbers."""
    needed = [(key, spans) for key, spans in plain.slices(shard) if count(spans)]
    if not needed or any(key not in files.tensors or not files.tensors[key].quantized for key, _ in needed):
        return None
    if shard.dim == 1 and len(needed) > 1:
        return None
    runs = [(kind, tuple(run)) for kind, run in itertools.groupby(needed, lambda item: files.tensors[item[0]].kind)]
    rows = [(kind, sum(count(spans) for _, spans in run)) for kind, run in runs]
    weight = _weight(shard, rows if shard.dim == 0 else [(kind, shard.shape[0]) for kind, _ in runs], dtype)
    return None if weight is None else InBlocks(plain, weight, tuple(run for _, run in runs))


@dataclasses.dataclass(frozen=True)
class Rounded:
    """The source of a parameter in blocks: the numbers of ``source``, rounded as they are read."""

    source: Source
    weight: BlockWeight

    def shapes(self, shard: Shard) -> Shapes:
        return self.source.shapes(shard)

    def fill(self, reader: Reader, name: str, shard: Shard, out: Tensor) -> None:
        """Read this rank's numbers, with those of blocks that it has in part, and round them into ``out``, int32."""
        (part,) = self.weight.parts
        if shard.dim == 1:
            (span,) = shard.spans
            start = span.start - self.weight.before
            spans: list[Spans] = [(range(start, min(start + part.columns, shard.shape[1])),)]
        else:
            spans = partition.chunks(shard.spans, max(LANES, ROUNDED // shard.shape[1] // LANES * LANES))
        at = 0
        for each in spans:
            some = dataclasses.replace(shard, spans=each)
            numbers = torch.empty(some.local_shape)
            self.source.fill(reader, name, some, numbers)
            at = _put(part, to_blocks(part.kind, numbers), out, at)
            reader.staging = max(reader.staging, 3 * numbers.nbytes)


def rounded(shard: Shard, kind: str, dtype: torch.dtype) -> BlockWeight | None:
    """This rank's part of a weight that is rounded to blocks; None for none, and for several slices of columns."""
    rows = count(shard.spans) if shard.dim == 0 else shard.shape[0]
    return _weight(shard, [(BLOCK_TYPES[kind], rows)], dtype) if count(shard.spans) else None


def _weight(shard: Shard, rows: Sequence[tuple[BlockType, int]], dtype: torch.dtype) -> BlockWeight | None:
    """So many rows of each type in the blocks that hold a shard's columns; None if these are several slices."""
    if shard.dim == 1 and len(shard.spans) > 1:
        return None
    columns = shard.spans[0] if shard.dim == 1 else range(shard.shape[1])
    parts = [
        Blocks(kind.name, height, -(-columns.stop // kind.columns) - columns.start // kind.columns)
        for kind, height in rows
    ]
    return BlockWeight(tuple(parts), columns.start % rows[0][0].columns, len(columns), dtype)


def hold_in_blocks(model: nn.Module, weight_of: Callable[[str, Shard], BlockWeight | None]) -> None:
    """Declare those weights of ``model``, which is on "meta", in blocks for which ``weight_of`` says how.

    Args:
        weight_of: given a parameter's name and shard rule; None: it stays as it is.
    """
    held: dict[nn.Parameter, nn.Parameter] = {}
    for name, module in model.named_modules():
        declared = getattr(module, "weight", None)
        if not isinstance(declared, nn.Parameter) or declared.dim() != 2:
            continue
        if declared in held:
            hold(module, held[declared])
        elif (weight := weight_of(f"{name}.weight", shard_of(declared))) is not None:
            held[declared] = hold(module, declare_blocks(weight, declared))
