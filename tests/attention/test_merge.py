"""Merging: any split of the keys gives what all of them together give."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multicard.attention.kernels import block_attention
from multicard.attention.merge import Accumulator, merge_all


def parts(cuts, scale=1.0, rows=6, keys=12):
    q, k, v = (torch.randn(2, n, 3, 8, generator=torch.Generator().manual_seed(n)) for n in (rows, keys, keys))
    bounds = [0, *sorted(cuts), keys]
    whole = block_attention(q.double(), k.double(), v.double(), scale=scale)
    return whole, [block_attention(q, k[:, a:b], v[:, a:b], scale=scale) for a, b in itertools.pairwise(bounds)]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 12), max_size=5), st.sampled_from([0.1, 1.0, 200.0]))
def test_any_split_of_the_keys(cuts, scale):
    (out, lse), blocks = parts(cuts, scale)
    total = Accumulator(6, 3)
    for out_part, lse_part in blocks:  # clones: the accumulator writes over its first part
        total.add(out_part.clone(), lse_part.clone())
    stacked = merge_all(torch.stack([o for o, _ in blocks]), torch.stack([x for _, x in blocks]))
    for merged in (total.result(torch.empty(2, 6, 3, 8), 8), stacked):
        torch.testing.assert_close(merged[0].double(), out, atol=1e-5, rtol=0)
        torch.testing.assert_close(merged[1], lse, atol=1e-4, rtol=1e-6)


def test_rows_that_no_part_has_seen_give_zeros():
    empty = torch.zeros(1, 2, 3, 4), torch.full((1, 2, 3), -math.inf)
    total = Accumulator(2, 3)
    total.add(*(x.clone() for x in empty))
    total.add(*empty)
    for out, lse in (total.result(torch.empty(1, 2, 3, 4), 4), merge_all(*(torch.stack([x, x]) for x in empty))):
        assert not out.any()
        assert (lse == -math.inf).all()


def test_nothing_added_gives_zeros_of_the_right_shape_and_dtype():
    out, lse = Accumulator(2, 3).result(torch.empty(1, 2, 3, 4, dtype=torch.bfloat16), 5)
    assert out.shape == (1, 2, 3, 5)
    assert out.dtype == torch.bfloat16
    assert not out.any()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("first_rows", [range(6), range(2, 6)])
def test_parts_for_some_rows_and_heads(first_rows):
    """A part that covers some rows only leaves the others as they are."""
    (out, _), blocks = parts([5])
    total = Accumulator(6, 3)
    for out_part, lse_part in blocks:
        for rows in (slice(first_rows.start, first_rows.stop), slice(0, first_rows.start)):
            for heads in (slice(0, 1), slice(1, 3)):
                total.add(out_part[:, rows, heads].clone(), lse_part[:, rows, heads].clone(), rows, heads)
    torch.testing.assert_close(total.result(out.float(), 8)[0].double(), out, atol=1e-5, rtol=0)


def test_a_half_precision_first_part_is_widened_before_more_is_added():
    (out, _), blocks = parts([5])
    total = Accumulator(6, 3)
    for out_part, lse_part in blocks:
        total.add(out_part.bfloat16(), lse_part)
    assert total.result(torch.empty(2, 6, 3, 8), 8)[0].dtype == torch.float32
    torch.testing.assert_close(total.result(out.float(), 8)[0].double(), out, atol=2e-2, rtol=0)
