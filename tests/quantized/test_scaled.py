"""Blocks with a scale and a zero: products, rows and numbers are ``scale * (code - zero)``, whatever the width."""

import itertools

import pytest
import torch

from multicard.quantized.products import few_rows, in_chunks, lookup
from multicard.quantized.scaled import SCALES, WIDTHS, Scaled, type_of
from multicard.quantized.words import LANES, Blocks

KINDS = [each for each in itertools.product(WIDTHS, SCALES, (False, True)) if each[0] != "E4M3" or not each[2]]


def matrix(kind, rows, width, missing=3):
    """Random blocks as they are kept, and their numbers, float32; the last block lacks some columns."""
    scales = (torch.rand(rows, width) + 0.1).to(SCALES[kind.scale])
    codes = torch.randint(0, 1 << WIDTHS[kind.codes], (rows, width * kind.columns - missing), dtype=torch.uint8)
    zeros = torch.randint(0, 1 << WIDTHS[kind.codes], (rows, width), dtype=torch.uint8) if kind.zero else None
    if kind.codes == "E4M3":
        codes[(codes & 127) == 127] = 0  # NaN
    dtype = {"S8": torch.int8, "E4M3": torch.float8_e4m3fn}.get(kind.codes, torch.uint8)
    whole = torch.nn.functional.pad(codes, (0, missing)).view(rows, width, -1).view(dtype).float()
    zero = 0 if zeros is None else zeros.view(dtype).float()[..., None]
    if zeros is None and kind.codes in ("U2", "U4"):
        zero = {"U2": 2, "U4": 8}[kind.codes]
    blocks = Blocks(kind.name, rows, width)
    raw = kind.pack(codes, scales, zeros)
    assert raw.shape == (rows, width, blocks.type.size)
    return blocks, blocks.interleave(raw), (scales.float()[..., None] * (whole - zero)).flatten(1)


@pytest.mark.parametrize(("codes", "scale", "zero"), KINDS, ids=str)
def test_products_rows_and_numbers(codes, scale, zero):
    torch.manual_seed(0)
    for columns, width, rows in [
        (16, 5, 1),
        (48, 3, LANES + 5),
        (32, 7, 3),
        (64, 6, LANES),
        (128, 3, 19),
        (160, 1, 17),
    ]:
        blocks, held, expected = matrix(Scaled(codes, columns, scale, zero), rows, width)
        x = torch.randn(2, blocks.columns)
        got = few_rows(blocks, held, x.unbind(0)).double()
        largest = (x.abs().double() @ expected.abs().double().T).max().item()
        torch.testing.assert_close(got, x.double() @ expected.double().T, rtol=0, atol=2e-6 * largest)
        assert torch.equal(torch.cat(list(in_chunks(blocks, held))), expected)
        some = torch.tensor([rows - 1, 0, rows // 2])
        assert torch.equal(lookup(blocks, held, some), expected[some])


def test_every_eighth_is_itself_where_small_numbers_count_as_zero():
    """All float8_e4m3fn; subnormal float32, which compiled code may take for 0, must not occur in between."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[127, 255]] = 0
    kind = Scaled("E4M3", 32, "F32", False)
    blocks = Blocks(kind.name, 8, 1)
    held = blocks.interleave(kind.pack(codes.view(8, 32), torch.ones(8, 1), None))
    torch.set_flush_denormal(True)
    try:
        found = [few_rows(blocks, held, [one])[0] for one in torch.eye(32)]
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(torch.stack(found, 1).flatten(), codes.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize(
    ("name", "columns", "bits"),
    [  # what files have for a column: codes, and a group's scale and zero
        ("U4x32-F16z", 4096, 4 + 20 / 32),
        ("U4x64-F16z", 4096, 4 + 20 / 64),
        ("U4x128-F16z", 4096, 4 + 20 / 128),
        ("U4x32-BF16", 4096, 4 + 16 / 32),
        ("U4x128-BF16", 4096, 4 + 16 / 128),
        ("U4x128-F32z", 4096, 4 + 36 / 128),
        ("U4x1376-F16z", 1376, 4 + 20 / 1376),
        ("U2x128-F16z", 4096, 2 + 18 / 128),
        ("S8x32-F16z", 4096, 8 + 24 / 32),
        ("S8x128-F16z", 4096, 8 + 24 / 128),
        ("S8x4096-F32", 4096, 8 + 32 / 4096),
        ("E4M3x128-BF16", 1408, 8 + 16 / 128 / 128),
        ("E4M3x1376-BF16", 1376, 8 + 16 / 1376),
    ],
)
def test_a_row_takes_what_files_have_for_it(name, columns, bits):
    blocks = Blocks(name, 1, columns // type_of(name).columns)
    assert blocks.columns == columns
    assert 4 * blocks.words <= 1.03 * columns * bits / 8
