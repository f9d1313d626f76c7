"""Products with a weight in row order, and attention of one token, against float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from multicard.attention.one_query import one_query
from multicard.layers import packed, rows

SIZES = st.integers(1, 40)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(ours, exact):
    assert ours.dtype in TOLERANCE
    scale = exact.abs().max().item() + 1e-9
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=TOLERANCE[ours.dtype] * scale)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([1, 2, 5, 8]), SIZES, SIZES, st.booleans(), st.sampled_from(list(TOLERANCE)))
def test_few_rows(count, out, size, biased, dtype):
    x, weight = numbers(1, count, size, seed=1, dtype=dtype), numbers(out, size, dtype=dtype)
    bias = numbers(out, seed=2, dtype=dtype) if biased else None
    y = rows.few_rows(x, weight, bias)
    assert y.shape == (1, count, out)
    close(y, F.linear(x.double(), weight.double(), None if bias is None else bias.double()))


@pytest.mark.parametrize("native", [True, False], ids=["as here", "no instructions for half types"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("count", [1, 2, 5, 33, 130])
def test_many_rows(monkeypatch, count, dtype, native):
    if not native:
        monkeypatch.setattr(packed, "available", lambda dtype: False)
    monkeypatch.setattr(rows, "CHUNK", 100)  # several pieces
    x, weight, bias = numbers(count, 1, 17, dtype=dtype), numbers(23, 17, seed=1, dtype=dtype), numbers(23, dtype=dtype)
    close(rows.multiply(x, weight, bias), F.linear(x.double(), weight.double(), bias.double()))
    close(rows.multiply(x, weight, None), F.linear(x.double(), weight.double()))


@settings(deadline=None, max_examples=40)
@given(SIZES, st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.sampled_from(list(TOLERANCE)))
def test_one_query(length, kv_heads, group, dim, dtype):
    q = numbers(1, 1, kv_heads * group, dim, dtype=dtype)
    k, v = (numbers(1, length, kv_heads, dim, seed=seed, dtype=dtype) for seed in (1, 2))
    whole = (x.double().transpose(1, 2) for x in (q, k, v))
    exact = F.scaled_dot_product_attention(*whole, enable_gqa=True).transpose(1, 2)
    close(one_query(q, k, v), exact)
