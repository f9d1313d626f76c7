"""Matrices in blocks: products, rows and numbers are those of what gguf says that they stand for."""

import gguf
import numpy as np
import pytest
import torch

import tiny_ggufs as tiny
from multicard.quantized.products import CHUNK, few_rows, in_chunks, lookup
from multicard.quantized.types import BLOCK_TYPES
from multicard.quantized.weight import BlockWeight
from multicard.quantized.words import LANES, Blocks


def matrix(kind, rows, width):
    """Random blocks, as they are kept, and their numbers."""
    columns = width * BLOCK_TYPES[kind].columns
    raw = tiny.blocks(kind, rows, columns, np.random.default_rng(rows))
    blocks = Blocks(kind, rows, width)
    held = blocks.interleave(torch.tensor(raw).view(rows, width, -1))
    assert held.nbytes == blocks.words * 4
    return blocks, held, torch.tensor(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])).double()


@pytest.mark.parametrize("rows", [1, LANES, LANES + 5, 3 * LANES - 1])
@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_products_rows_and_numbers(kind, rows):
    width = 3  # where only two blocks fill whole words, one is left over
    blocks, held, numbers = matrix(kind, rows, width)
    assert held.nbytes <= rows * (1.02 * width * blocks.type.size + 2)
    x = torch.randn(2, blocks.columns)
    expected = x.double() @ numbers.T
    got = few_rows(blocks, held, x.unbind(0))
    largest = (x.abs().double() @ numbers.abs().T).max().item()  # what terms add up to that may cancel each other
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6 * largest)
    assert torch.equal(torch.cat(list(in_chunks(blocks, held))).double(), numbers)
    some = torch.tensor([[rows - 1, 0], [rows // 2, rows // 3]])
    assert torch.equal(lookup(blocks, held, some).double(), numbers[some])


def test_chunks_are_small_and_there_are_several(monkeypatch):
    monkeypatch.setattr("multicard.quantized.products.CHUNK", 2 * LANES * 64)
    blocks, held, numbers = matrix("Q8_0", 5 * LANES + 1, 2)
    chunks = list(in_chunks(blocks, held))
    assert [len(chunk) for chunk in chunks] == [2 * LANES, 2 * LANES, LANES, 1]
    assert torch.equal(torch.cat(chunks).double(), numbers)
    assert CHUNK > 2 * LANES * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_a_weight_of_two_types_that_is_cut_inside_a_block(rows, dtype):
    """Columns 7 to 89 of three blocks, as a row-parallel layer has them; a bias; any number of rows."""
    kinds = [matrix("Q4_1", 37, 3), matrix("Q8_0", LANES, 3)]
    held = torch.cat([held for _, held, _ in kinds])
    numbers = torch.cat([numbers for *_, numbers in kinds])[:, 7:90]
    weight = BlockWeight(tuple(blocks for blocks, *_ in kinds), before=7, columns=83, dtype=dtype)
    assert len(held) == weight.words
    x, bias = torch.randn(2, rows, 83).to(dtype), torch.randn(53).to(dtype)
    expected = x.double() @ numbers.T + bias.double()
    largest = (x.abs().double() @ numbers.abs().T).max().item()
    exact = {torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype] * largest
    for multiply in (weight.multiply, *([weight.few_rows] if rows < 8 else [])):
        got = multiply(x, held, bias)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=exact)
    assert torch.equal(weight.numbers(held).double(), numbers)


def test_smallest_and_largest_scales():
    """float16's subnormal numbers too, which compiled code would take for 0 if it made float32's of them."""
    raw = torch.zeros(LANES, 1, 20, dtype=torch.uint8)
    scales = torch.tensor([2**-24, 3 * 2**-24, 2**-15, 2**-14, 65504.0, -65504.0, -(2**-24), 0.0]).half()
    raw[: len(scales), 0, :2] = scales.view(torch.uint8).view(-1, 2)
    raw[:, 0, 4] = 1  # column 0 is 1, all others 0
    blocks = Blocks("Q4_1", LANES, 1)
    one = torch.zeros(32)
    one[0] = 1
    torch.set_flush_denormal(True)
    try:
        got = few_rows(blocks, blocks.interleave(raw), [one])[0]
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(got[: len(scales)], scales.float())
