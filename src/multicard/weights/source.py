"""A parameter's source: the tensors of a checkpoint that it is made of, and how this rank's part is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from multicard.errors import CheckpointError
from multicard.layers.shard import Shard, Spans
from multicard.weights.checkpoint import Checkpoint
from multicard.weights.files import TensorFiles
from multicard.weights.gguf.files import GGUFFiles

Shapes = Mapping[str, tuple[int, ...]]


class Source(Protocol):
    """The tensors from which one parameter (or several) is read."""

    def shapes(self, shard: Shard) -> Shapes:
        """The tensors that a checkpoint must hold for a parameter with this shard rule: whole shapes by name."""

    def fill(self, reader: Reader, name: str, shard: Shard, out: Tensor) -> None:
        """Read this rank's part of the parameter called ``name`` into ``out``."""


class Reader:
    """Reads slices of a checkpoint's tensors, and counts bytes.

    Attributes:
        bytes_read: of tensors, so far.
        shard_bytes: what the slices that were asked for take in the files.
        dequantized_bytes: what slices of quantised tensors take in memory.
        staging: bytes of the largest staging buffers since this was last set to 0.
    """

    def __init__(self, checkpoint: TensorFiles) -> None:
        self.checkpoint = checkpoint
        self.bytes_read = self.shard_bytes = self.dequantized_bytes = self.staging = 0

    def rows(self, key: str, dim: int, rows: range, out: Tensor) -> None:
        """Read ``rows`` of a tensor along ``dim`` into ``out``."""
        self._read(key, dim, rows, out)
        stored = self.checkpoint.tensors[key]
        self.shard_bytes += stored.size(out.numel())
        self.dequantized_bytes += out.nbytes if stored.quantized else 0

    def _read(self, key: str, dim: int, rows: range, out: Tensor) -> None:
        size, staging = self.checkpoint.read(key, dim, rows, out)
        self.bytes_read += size
        self.staging = max(self.staging, staging)

    def spans(self, key: str, dim: int, spans: Spans, out: Tensor, start: int = 0) -> int:
        """Read spans of a tensor into consecutive rows of ``out`` from ``start``; returns the row after them."""
        for span in spans:
            self.rows(key, dim, span, out.narrow(dim, start, len(span)))
            start += len(span)
        return start

    def blocks(self, key: str, rows: range, columns: range) -> Tensor:
        """The blocks that hold ``columns`` of ``rows`` of a quantised matrix, uint8 ``(rows, blocks, bytes)``."""
        files = self.checkpoint
        assert isinstance(files, GGUFFiles)
        raw, _ = files.blocks(key, rows, columns)
        self.bytes_read += raw.nbytes
        self.shard_bytes += files.tensors[key].size(len(rows) * len(columns))
        return raw

    def rectangle(self, key: str, rows: range, columns: range) -> Tensor:
        """Rows and columns of a matrix in a folder as they are stored, ``(rows, columns)``."""
        files = self.checkpoint
        assert isinstance(files, Checkpoint)
        found = files.rectangle(key, rows, columns)
        self.bytes_read += found.nbytes
        self.shard_bytes += found.nbytes
        return found

    def whole(self, key: str) -> Tensor:
        """All of a tensor, in float32."""
        shape = self.checkpoint.tensors[key].shape
        out = torch.empty(shape or 1)
        self._read(key, 0, range(len(out)), out)
        return out.view(shape)


@dataclasses.dataclass(frozen=True)
class Plain:
    """One tensor, or one for each part of a fused parameter: ``...qkv_proj.weight`` is in ``...q_proj.weight`` etc."""

    key: str

    def shapes(self, shard: Shard) -> Shapes:
        whole = shard.shape[::-1] if shard.transposed else shard.shape
        before, after = whole[: shard.dim], whole[shard.dim + 1 :]
        return {self._part(part): (*before, size, *after) for part, size in shard.parts} or {self.key: whole}

    def fill(self, reader: Reader, name: str, shard: Shard, out: Tensor) -> None:
        if shard.transposed:
            staged = torch.empty(out.shape[::-1], dtype=out.dtype, device=out.device)
            reader.spans(self.key, 1 - shard.dim, shard.spans, staged)
            out.copy_(staged.T)
            return
        if not out.dim():
            reader.rows(self.key, 0, range(1), out.view(1))
            return
        at = 0
        for key, spans in self.slices(shard):
            stop = reader.spans(key, shard.dim, spans, out, at)
            if shard.dim == 0 and (ordered := self.in_order(key, rows := out[at:stop])) is not rows:
                rows.copy_(ordered)
            at = stop

    @property
    def together(self) -> int:
        """Adjacent rows that :meth:`in_order` needs together: it takes multiples of so many."""
        return 1

    def in_order(self, key: str, rows: Tensor) -> Tensor:
        """Rows of a tensor in the order in which the model has them."""
        return rows

    def slices(self, shard: Shard) -> list[tuple[str, Spans]]:
        """Tensors and their spans along the shard rule's dimension, in the order of the parameter's rows."""
        found = []
        parts = [(self._part(part), size) for part, size in shard.parts] or [(self.key, shard.shape[shard.dim])]
        for span in shard.spans:
            start = 0
            for key, size in parts:
                found.append((key, within((span,), start, size)))
                start += size
        return found

    def _part(self, part: str) -> str:
        module, _, leaf = self.key.rpartition(".")
        return f"{module.rpartition('.')[0]}.{part}.{leaf}"


@dataclasses.dataclass(frozen=True)
class Stacked:
    """``(experts, rows, columns)`` from matrices of single experts.

    Attributes:
        groups: for each matrix that is stacked along the rows (gate and up), its name for every expert.
    """

    groups: Sequence[Sequence[str]]

    def shapes(self, shard: Shard) -> Shapes:
        experts, rows, columns = shard.shape
        for keys in self.groups:
            if len(keys) != experts:
                raise CheckpointError(f"{len(keys)} tensors like {keys[0]!r}, where the config asks for {experts}")
        return {key: (rows // len(self.groups), columns) for keys in self.groups for key in keys}

    def fill(self, reader: Reader, name: str, shard: Shard, out: Tensor) -> None:
        _, rows, _ = shard.shape
        share = rows // len(self.groups)
        for expert, mine in enumerate(out):
            at = 0
            for number, keys in enumerate(self.groups):
                if shard.dim == 2:
                    reader.spans(keys[expert], 1, shard.spans, mine[at : at + share])
                    at += share
                else:
                    spans = shard.spans if shard.dim == 1 else (range(rows),)
                    at = reader.spans(keys[expert], 0, within(spans, number * share, share), mine, at)


class Converted:
    """Parameters that a function computes from whole tensors, read once for all of these parameters.

    Args:
        convert: takes a function that reads a whole tensor by name; returns whole parameters by name.
    """

    def __init__(self, convert: Callable[[Callable[[str], Tensor]], Mapping[str, Tensor]]) -> None:
        self._convert = convert
        self._made: dict[str, Tensor] = {}

    def shapes(self, shard: Shard) -> Shapes:
        return {}

    def fill(self, reader: Reader, name: str, shard: Shard, out: Tensor) -> None:
        if name not in self._made:
            self._made |= self._convert(reader.whole)
        if name not in self._made:
            raise CheckpointError(f"{reader.checkpoint.where}: the conversion of its tensors gives no {name!r}")
        made = self._made.pop(name)
        out.copy_(shard.take(made.T if shard.transposed else made))


def within(spans: Spans, start: int, size: int) -> Spans:
    """The parts of ``spans`` inside the ``size`` rows from ``start``, relative to ``start``."""
    cut = (range(max(s.start, start) - start, min(s.stop, start + size) - start) for s in spans)
    return tuple(s for s in cut if len(s))
