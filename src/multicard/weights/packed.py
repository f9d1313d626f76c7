"""Sources of parameters whose matrices a checkpoint has packed, as its ``quantization_config`` says."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from multicard import partition
from multicard.errors import CheckpointError
from multicard.layers.shard import Shard, Spans, count
from multicard.quantized.scaled import PIECE, Scaled
from multicard.quantized.weight import BlockWeight
from multicard.quantized.words import LANES, Blocks, dequantize
from multicard.weights.blocks import ROUNDED
from multicard.weights.checkpoint import Checkpoint
from multicard.weights.schemes.method import FLOATS, Layout, Method, groups_of
from multicard.weights.schemes.scheme import Scheme
from multicard.weights.source import Plain, Reader, Shapes

LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj|lm_head")
"""Linear modules, which a scheme may pack; norms and the embedding it doesn't."""


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A packed matrix in a checkpoint.

    Attributes:
        module: whose.
        shape: outputs and inputs.
    """

    files: Checkpoint
    module: str
    shape: tuple[int, int]
    method: Method

    def check(self) -> None:
        """Raise CheckpointError or UnsupportedError where its tensors aren't what the config says."""
        self.check_shapes()
        self.method.check(self.files, self.module, self.shape)

    def check_shapes(self) -> None:
        """The same, as far as headers of files tell."""
        tensors, asks = self.files.tensors, "quantization_config asks for"
        plain = tensors.get(f"{self.module}.weight")
        for leaf, (shape, dtypes) in self.method.tensors(self.shape).items():
            entry = tensors.get(f"{self.module}.{leaf}")
            if plain is not None and plain.dtype in FLOATS:
                raise CheckpointError(f"{plain.path}: {plain.name} is {plain.dtype}, where {asks} quantised weights")
            if entry is None:
                raise CheckpointError(f"{self.files.where}: no tensor {f'{self.module}.{leaf}'!r}, which {asks}")
            if (entry.shape or (1,)) != shape or entry.dtype not in dtypes:
                raise CheckpointError(
                    f"{entry.path}: {entry.name} is {entry.dtype} {entry.shape} where {asks} {' or '.join(dtypes)} "
                    f"{shape}"
                )

    @property
    def layout(self) -> Layout:
        leaves = self.method.tensors(self.shape)
        entries = {leaf: self.files.tensors[f"{self.module}.{leaf}"] for leaf in leaves}
        return self.method.layout(entries, self.shape)

    @property
    def unit(self) -> int | None:
        """Columns of a block: of a group, or of a part of one, if only parts fill a row; None: a row is one group."""
        group, inputs = self.layout.group, self.shape[1]
        if group is None or inputs % group == 0:
            return group
        part = math.gcd(group, inputs)
        return group if part % PIECE else part

    def block(self, columns: range) -> Scaled:
        """The type of blocks that hold these columns of it: where a row is one group, a block is all of them."""
        layout, width = self.layout, self.unit or -(-len(columns) // PIECE) * PIECE
        return Scaled(layout.codes, width, layout.scale, layout.zero)

    def whole(self, columns: range) -> range:
        """The columns of the blocks that these are in."""
        return self._whole(columns, self.unit)

    def _whole(self, columns: range, size: int | None) -> range:
        if size is None:
            return columns
        return range(columns.start // size * size, min(-(-columns.stop // size) * size, self.shape[1]))

    def blocks(self, reader: Reader, rows: range, columns: range) -> Tensor:
        """Uint8 ``(rows, blocks, bytes)`` with these columns; one of ``rows`` and ``columns`` is all."""
        block, group, columns = self.block(columns), self.layout.group, self.whole(columns)
        read = self._whole(columns, group)
        codes, scales, zeros = self.method.read(reader, self.module, self.shape, rows, read)
        what = f"{self.files.where}: {self.module}"
        if not scales.isfinite().all():
            raise CheckpointError(f"{what} has a scale that isn't a finite number")
        if block.codes == "E4M3" and ((codes & 127) == 127).any():
            raise CheckpointError(f"{what} has weights that aren't numbers (NaN)")
        if group is not None and group != block.columns:
            inside = range(columns.start - read.start, columns.stop - read.start)
            codes = codes[:, inside.start : inside.stop]
            held = groups_of(inside, block.columns)
            scales = scales.repeat_interleave(group // block.columns, 1)[:, held.start : held.stop]
            if zeros is not None:
                zeros = zeros.repeat_interleave(group // block.columns, 1)[:, held.start : held.stop]
        raw = block.pack(codes, scales, zeros)
        reader.staging = max(reader.staging, 2 * codes.nbytes + 2 * raw.nbytes)
        return raw

    def numbers(self, reader: Reader, rows: range, columns: range) -> Tensor:
        """The same in float32, ``(rows, columns)``."""
        raw, before = self.blocks(reader, rows, columns), columns.start - self.whole(columns).start
        return dequantize(self.block(columns).name, raw)[:, before : before + len(columns)]


@dataclasses.dataclass(frozen=True)
class Packed:
    """The source of a parameter of which some parts, or all, are packed matrices.

    Attributes:
        weight: the blocks that it is declared in; None: it is numbers.
    """

    plain: Plain
    scheme: Scheme
    files: Checkpoint
    weight: BlockWeight | None = None

    def shapes(self, shard: Shard) -> Shapes:
        """Of tensors that aren't packed; those that are have been checked then."""
        plain = {}
        for key, shape in self.plain.shapes(shard).items():
            if (matrix := matrix_of(self.files, self.scheme, key, shape)) is None:
                plain[key] = shape
            else:
                matrix.check()
        return plain

    def fill(self, reader: Reader, name: str, shard: Shard, out: Tensor) -> None:
        """Read this rank's part into ``out``: int32 of one dimension, or numbers."""
        if self.weight is not None:
            self._fill_blocks(reader, shard, self.weight, out)
            return
        shapes, at = self.plain.shapes(shard), 0
        for key, spans in self.plain.slices(shard):
            matrix = matrix_of(self.files, self.scheme, key, shapes[key])
            if matrix is None:
                at = reader.spans(key, shard.dim, spans, out, at)
                continue
            for rows, columns in _pieces(matrix, shard.dim, spans):
                numbers = matrix.numbers(reader, rows, columns)
                size = numbers.shape[shard.dim]
                out.narrow(shard.dim, at, size).copy_(numbers)
                reader.dequantized_bytes += numbers.numel() * out.element_size()
                at += size

    def _fill_blocks(self, reader: Reader, shard: Shard, weight: BlockWeight, out: Tensor) -> None:
        shapes, raws = self.plain.shapes(shard), []
        parts = iter(weight.parts)
        part, at = next(parts), 0
        for key, spans in self.plain.slices(shard):
            matrix = matrix_of(self.files, self.scheme, key, shapes[key])
            assert matrix is not None
            for rows, columns in _pieces(matrix, shard.dim, spans):
                raws.append(matrix.blocks(reader, rows, columns))
                if sum(map(len, raws)) == part.rows:
                    out[at : at + part.words] = part.interleave(torch.cat(raws))
                    at, part, raws = at + part.words, next(parts, part), []


def matrix_of(files: Checkpoint, scheme: Scheme, key: str, shape: tuple[int, ...]) -> Matrix | None:
    """The packed matrix in place of a tensor ``module.weight``; None: it isn't packed."""
    module, _, leaf = key.rpartition(".")
    method = scheme.method_of(module) if leaf == "weight" and LINEAR.fullmatch(module) else None
    return None if method is None else Matrix(files, module, (shape[0], shape[1]), method)


def packed(files: Checkpoint, scheme: Scheme, plain: Plain, shard: Shard, dtype: torch.dtype) -> BlockWeight | None:
    """This rank's part of a parameter in blocks; None where some of it is stored as plain numbers.

    Raises CheckpointError where its tensors aren't what ``scheme`` says.
    """
    if not count(shard.spans) or (shard.dim == 1 and len(shard.spans) > 1):
        return None
    columns = shard.spans[0] if shard.dim == 1 else range(shard.shape[-1])
    parts: list[Blocks] = []
    before = 0
    for key, spans in plain.slices(shard):
        matrix = matrix_of(files, scheme, key, plain.shapes(shard)[key])
        if matrix is None:
            return None
        matrix.check_shapes()
        block, whole = matrix.block(columns), matrix.whole(columns)
        rows = count(spans) if shard.dim == 0 else shard.shape[0]
        part = Blocks(block.name, rows, -(-len(whole) // block.columns))
        before = columns.start - whole.start
        if parts and parts[-1].kind == part.kind:
            parts[-1] = dataclasses.replace(part, rows=rows + parts[-1].rows)
        elif rows:
            parts.append(part)
    return BlockWeight(tuple(parts), before, len(columns), dtype)


def _pieces(matrix: Matrix, dim: int, spans: Spans) -> Iterator[tuple[range, range]]:
    """Rows and columns of a matrix that are read at a time."""
    outputs, inputs = matrix.shape
    if dim == 1:
        yield from ((range(outputs), span) for span in spans)
    else:
        some = partition.chunks(spans, max(LANES, ROUNDED // inputs))
        yield from ((rows, range(inputs)) for each in some for rows in each)


def is_part(scheme: Scheme, name: str, files: Checkpoint | None = None) -> bool:
    """Whether a tensor that the model has no use for belongs to a packed matrix.

    Args:
        files: where a bias has to be 0; None: it isn't looked at.
    """
    module, _, leaf = name.rpartition(".")
    method = scheme.method_of(module) if LINEAR.fullmatch(module) else None
    if method is None or leaf not in method.tensors((1, 1)).keys() | method.more:
        return False
    if leaf != "bias" or files is None:
        return True
    entry = files.tensors[name]
    if entry.dtype not in FLOATS or len(entry.shape) != 1:
        return False
    return not files.rectangle(name, range(1), range(entry.shape[0])).any()
