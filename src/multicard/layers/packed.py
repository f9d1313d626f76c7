"""Weights in the order in which the CPU's matrix kernel reads them, for steps that aren't compiled.

Multiplying a single row is as fast as reading the weight. MKL reads a weight in row order, as checkpoints have it, at
half of the memory bandwidth; a weight reordered into oneDNN's blocks is read at nearly all of it, in float32 and in
bfloat16 (docs/llm.md has the figures). The reordered weight replaces the plain one, so it takes no additional memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor, nn

from multicard.layers.embedding import VocabParallelEmbedding
from multicard.layers.head import ParallelLMHead
from multicard.layers.linear import ColumnParallelLinear, RowParallelLinear
from multicard.layers.shard import shard_of, sharded

PACKED_TYPES = (torch.float32, torch.bfloat16)


def available(dtype: torch.dtype) -> bool:
    """Whether this torch has, for this dtype, oneDNN and the operators with which its compiler freezes linear layers.

    bfloat16 needs a processor with AVX-512 or newer; on others MKL multiplies it as before.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(layer: nn.Module, keep_weight: bool = False) -> bool:
    """Make a linear layer or head on the CPU multiply with oneDNN; other layers aren't changed.

    Args:
        layer: its weight is reordered, so it can't be read afterwards.
        keep_weight: keep the weight in row order: faster than MKL, but by less.

    Returns:
        whether the weight was reordered; if so, it was held twice for a moment.
    """
    if not isinstance(layer, ColumnParallelLinear | RowParallelLinear | ParallelLMHead):
        return False
    if "multiply" in vars(layer) or not _can_be_packed(layer.weight):  # a quantised weight has its own product
        return False
    layer.multiply = multiply
    if not keep_weight:
        layer.weight = _reordered(layer.weight)
    return not keep_weight


def packer(model: nn.Module) -> Callable[[nn.Module], int]:
    """:func:`pack` for each linear layer of ``model``; a weight shared with an embedding table stays in row order.

    Returns:
        a function to be called with each module, which returns 0: the ``finish`` of :func:`multicard.weights.load`.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, VocabParallelEmbedding)}
    linears = [m for m in model.modules() if isinstance(m, ColumnParallelLinear | RowParallelLinear)]
    shared = {m for m in linears if id(m.weight) in tables}

    def finish(module: nn.Module) -> int:
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            pack(module, keep_weight=module in shared)
        return 0

    return finish


def add_to_weight(layer: ColumnParallelLinear | RowParallelLinear, delta: Tensor) -> None:
    """Add ``delta``, of the weight's shape, to a layer's weight, packed or not; a tied weight changes everywhere."""
    weight = layer.weight
    if weight.is_mkldnn:
        dense = weight.detach().to_dense(weight.dtype) + delta.to(weight.dtype)
        layer.weight = _reordered(sharded(dense, shard_of(weight)))
    else:
        weight.detach().add_(delta.to(weight.dtype))


def pack_tied(embedding: VocabParallelEmbedding, head: ParallelLMHead) -> bool:
    """The same for a head that shares its weight with the embedding, which then looks its rows up in the blocks.

    oneDNN doesn't document the order of its blocks. The reordered weight is compared with the likely order, number by
    number; if they differ, the weight stays in row order.

    Returns:
        whether the weight was reordered.
    """
    weight = head.weight
    if weight is not embedding.weight or not _can_be_packed(weight):
        return False
    packed = _reordered(weight)
    blocks = _blocks(packed, weight)
    if blocks is None:
        return pack(head, keep_weight=True)
    head.multiply, head.weight = multiply, packed
    embedding.lookup, embedding.weight = BlockedRows(blocks, weight.shape[1]), packed
    return True


class BlockedRows:
    """``F.embedding`` with rows in blocks ``(rows / b, columns / v, b, v)``; columns may be padded."""

    def __init__(self, blocks: Tensor, columns: int) -> None:
        self.blocks, self.columns = blocks, columns

    def __call__(self, ids: Tensor, weight: Tensor) -> Tensor:
        """A view of ``weight`` as blocks; ``weight`` is an argument so that its memory outlives the view."""
        height = self.blocks.shape[2]
        rows = self.blocks[ids // height, :, ids % height]
        return rows.flatten(-2)[..., : self.columns]


def _blocks(packed: Tensor, weight: Tensor) -> Tensor | None:
    size = torch.ops.mkldnn._nbytes(packed)
    held = (ctypes.c_char * size).from_address(torch.ops.mkldnn.data_ptr(packed))
    flat = torch.frombuffer(held, dtype=weight.dtype)
    count, columns = weight.shape
    deep = 1 if weight.dtype == torch.float32 else 2  # half types are multiplied in pairs
    for height in (64, 48, 32, 16):
        area = -(-count // height) * height * deep
        if flat.numel() % area or flat.numel() // area * deep < columns:
            continue
        blocks = flat.view(-(-count // height), flat.numel() // area, height, deep)
        rows = BlockedRows(blocks, columns)
        if all(torch.equal(rows(ids, packed), weight[ids]) for ids in torch.arange(count).split(1024)):
            return blocks
    return None


def _can_be_packed(weight: Tensor) -> bool:
    plain = weight.device.type == "cpu" and weight.dtype in PACKED_TYPES and not weight.is_mkldnn
    return plain and weight.numel() > 0 and available(weight.dtype)


def _reordered(weight: Tensor) -> nn.Parameter:
    return sharded(torch.ops.mkldnn._reorder_linear_weight(weight.detach()), shard_of(weight))


@torch.library.custom_op(
    "multicard::packed_linear", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor"
)
def _traced(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """For compiled graphs: Inductor takes a reordered weight of oneDNN's own operator only as a constant."""
    return multiply(x, weight, bias)


@_traced.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x Aᵀ + b`` by oneDNN; a weight in row order is reordered in each call."""
    if torch.compiler.is_compiling():
        return _traced(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
