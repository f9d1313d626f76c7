"""Weights that stay in the blocks of a file: what this rank's part of one is, and reading it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from multicard.layers.shard import Shard, Spans, count, shard_of
from multicard.quantized.weight import BlockWeight, declare_blocks, hold
from multicard.quantized.words import Blocks
from multicard.weights.gguf.files import GGUFFiles
from multicard.weights.source import Plain, Reader, Shapes


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
        """Read this rank's blocks into ``out``, int32 of one dimension."""
        at = 0
        for part, slices in zip(self.weight.parts, self.slices, strict=True):
            raws = []
            for key, spans in slices:
                raw = torch.cat([reader.blocks(key, shard.dim, span) for span in spans])
                raws.append(self.plain.in_order(key, raw) if shard.dim == 0 else raw)
            out[at : at + part.words] = part.interleave(torch.cat(raws))
            at += part.words


def in_blocks(files: GGUFFiles, plain: Plain, shard: Shard, dtype: torch.dtype) -> InBlocks | None:
    """This rank's part of a weight in blocks; None where that can't be: a part is stored as plain numbers."""
    needed = [(key, spans) for key, spans in plain.slices(shard) if count(spans)]
    if not needed or any(key not in files.tensors or not files.tensors[key].quantized for key, _ in needed):
        return None
    runs = [(kind, tuple(run)) for kind, run in itertools.groupby(needed, lambda item: files.tensors[item[0]].kind)]
    if shard.dim == 0:
        parts = [
            Blocks(kind.name, sum(count(spans) for _, spans in run), shard.shape[1] // kind.columns)
            for kind, run in runs
        ]
        weight = BlockWeight(tuple(parts), 0, shard.shape[1], dtype)
    else:
        ((kind, ((_, spans), *others)), *more) = runs
        if others or more or len(spans) > 1:
            return None
        first, stop = spans[0].start // kind.columns, -(-spans[0].stop // kind.columns)
        part = Blocks(kind.name, shard.shape[0], stop - first)
        weight = BlockWeight((part,), spans[0].start - first * kind.columns, len(spans[0]), dtype)
    return InBlocks(plain, weight, tuple(run for _, run in runs))


def hold_in_blocks(model: nn.Module, files: GGUFFiles, source_of: Callable[[str], Plain], dtype: torch.dtype) -> None:
    """Declare those weights of ``model`` in blocks, which is on "meta", that ``files`` has in blocks.

    Args:
        source_of: the source of a parameter by its name.
        dtype: of embedded tokens.
    """
    held: dict[nn.Parameter, nn.Parameter] = {}
    for name, module in model.named_modules():
        declared = getattr(module, "weight", None)
        if not isinstance(declared, nn.Parameter) or declared.dim() != 2:
            continue
        if declared in held:
            hold(module, held[declared])
        elif (source := in_blocks(files, source_of(f"{name}.weight"), shard_of(declared), dtype)) is not None:
            held[declared] = hold(module, declare_blocks(source.weight, declared))
