"""Kernels: out and LSE against float64, and the traps of torch's CPU kernel."""

import importlib
import itertools
import math
import sys
import types

import pytest
import torch

from multicard.attention.kernels import (
    KERNELS,
    Request,
    ascend,
    block_attention,
    choose,
    flash_attn,
    reference,
    torch_cpu,
    torch_cuda,
)
from multicard.errors import ConfigError

MASKS = [None, "bool 2 1 1", "bool 1 1 5", "float 2 4 5", "bool 2 4 1", "float 1 1 1"]


def tensors(rows=5, keys=7, heads=4, kv_heads=2, head_dim=16, value_dim=16, dtype=torch.float32, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, heads, head_dim), (keys, kv_heads, head_dim), (keys, kv_heads, value_dim))
    return [torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes]


def make_mask(kind, keys, rows, seed=1):
    if kind is None:
        return None
    name, batch, heads, height = kind.split()
    keep = (
        torch.rand(
            int(batch), int(heads), rows if height != "1" else 1, keys, generator=torch.Generator().manual_seed(seed)
        )
        < 0.7
    )
    return keep if name == "bool" else torch.where(keep, torch.randn(keep.shape), -math.inf)


def exact(q, k, v, mask=None, causal=False, scale=0.25):
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).nan_to_num(0.0), v)
    return out, scores.logsumexp(-1).transpose(1, 2)


def assert_matches(got, wanted, tolerance=1e-5):
    out, lse = got
    assert lse.dtype == torch.float32
    assert torch.equal(lse.isinf(), wanted[1].isinf())
    torch.testing.assert_close(out.double(), wanted[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), wanted[1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kernel", [torch_cpu.KERNEL, reference.KERNEL], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_out_and_lse(kernel, mask, rows):
    q, k, v = tensors(rows=rows)
    mask = make_mask(mask, 7, rows)
    assert_matches(block_attention(q, k, v, scale=0.25, mask=mask, kernel=kernel), exact(q, k, v, mask))


@pytest.mark.parametrize("kernel", [torch_cpu.KERNEL, reference.KERNEL], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("masked", [False, True])
def test_causal_squares(kernel, masked):
    q, k, v = tensors(rows=33, keys=33)
    mask = make_mask("bool 2 1 33", 33, 33) if masked else None
    got = block_attention(q, k, v, scale=0.25, mask=mask, causal=True, kernel=kernel)
    assert_matches(got, exact(q, k, v, mask, causal=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3), (torch.float64, 1e-6)])
@pytest.mark.parametrize("rows", [2, 30])
def test_dtypes(dtype, tolerance, rows):
    q, k, v = tensors(rows=rows, dtype=dtype)
    assert_matches(block_attention(q, k, v, scale=0.25), exact(q, k, v), tolerance)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(16, 24), (24, 16), (5, 3), (192, 128)])
def test_head_dims_that_differ_keep_the_fast_kernel(head_dim, value_dim):
    q, k, v = tensors(head_dim=head_dim, value_dim=value_dim)
    out, lse = block_attention(q, k, v, scale=0.25)
    assert out.shape[-1] == value_dim
    assert_matches((out, lse), exact(q, k, v))


@pytest.mark.parametrize(("rows", "keys", "batch"), [(0, 7, 1), (5, 0, 1), (0, 0, 1), (5, 7, 0)])
def test_empty_inputs_never_reach_the_kernel(rows, keys, batch):
    """torch's CPU kernel ends the process with SIGFPE."""
    q, k, v = tensors(rows=rows, keys=keys, batch=batch, value_dim=24)
    out, lse = block_attention(q, k, v, scale=0.25)
    assert out.shape == (batch, rows, 4, 24)
    assert not out.any()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("kind", ["bool", "float", "finite"])
def test_rows_with_nothing_to_attend_to(kind):
    """torch's CPU kernel gives them LSE 0, as if they had seen one key."""
    q, k, v = tensors(rows=600, keys=700, heads=2)
    mask = torch.ones(2, 1, 600, 700, dtype=torch.bool)
    mask[0, :, 3] = False
    mask[1, :, :, :650] = False
    if kind != "bool":
        mask = torch.zeros(mask.shape).masked_fill_(
            ~mask, -math.inf if kind == "float" else torch.finfo(torch.float32).min
        )
    out, lse = block_attention(q, k, v, scale=0.25, mask=mask)
    assert not out[0, 3].any()
    assert (lse[0, 3] == -math.inf).all()
    keep = mask if kind == "bool" else mask > -1
    assert_matches((out, lse), exact(q, k, v, keep))


def test_query_heads_that_are_no_multiple_are_refused():
    """torch's CPU kernel accepts 5 over 2 and reads some wrong key/value head."""
    q, k, v = tensors(heads=5, kv_heads=2)
    with pytest.raises(ConfigError, match="5 query heads over 2"):
        block_attention(q, k, v, scale=0.25)


def test_inner_strides():
    """torch's CPU kernel reads them as if they were 1."""
    q, k, v = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in tensors(heads=2, kv_heads=2))
    assert q.stride(-1) != 1
    assert_matches(block_attention(q, k, v, scale=0.25), exact(q, k, v))


@pytest.mark.parametrize("scale", [0.0, -0.5])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [None, "bool 2 4 5"])
def test_scales_that_are_not_positive(scale, causal, masked):
    q, k, v = tensors(rows=7)
    mask = make_mask(masked, 7, 7)
    got = block_attention(q, k, v, scale=scale, causal=causal, mask=mask)
    assert_matches(got, exact(q, k, v, mask, causal, scale))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("lowest", [-math.inf, "finfo"])
def test_additive_masks_of_any_dtype(dtype, lowest):
    q, k, v = tensors()
    keep = make_mask("bool 2 1 5", 7, 5)
    mask = torch.zeros(keep.shape, dtype=dtype)
    mask = mask.masked_fill(~keep, torch.finfo(dtype).min if lowest == "finfo" else lowest)
    assert_matches(block_attention(q, k, v, scale=0.25, mask=mask), exact(q, k, v, keep))


def test_scores_large_enough_to_overflow_exp():
    q, k, v = tensors(rows=20)
    assert_matches(block_attention(q * 300, k, v, scale=1.0), exact(q * 300, k, v, scale=1.0), 1e-4)


REQUESTS = [
    Request(device, dtype, rows, rows, heads, 2, dim, value_dim, causal, masked)
    for device in ("cpu", "cuda", "npu", "xpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for rows, heads in ((1, 2), (64, 4))
    for dim, value_dim in ((64, 64), (12, 12), (192, 128), (512, 512))
    for causal, masked in itertools.product((False, True), repeat=2)
]


def test_no_kernel_is_chosen_for_what_it_refuses(monkeypatch):
    monkeypatch.setitem(KERNELS, "cuda", (flash_attn.KERNEL, *KERNELS["cuda"]))
    monkeypatch.setitem(KERNELS, "npu", (ascend.KERNEL,))
    chosen = {choose(request).name for request in REQUESTS if choose(request).refuses(request) is None}
    assert all(choose(request).refuses(request) is None for request in REQUESTS)
    assert chosen >= {"torch_cpu_flash", "flash_attn", "torch_cuda_efficient", "ascend_fusion", "reference"}


@pytest.mark.parametrize(
    ("kernel", "dtype", "mask"),
    [
        (torch_cuda.FLASH, torch.bfloat16, None),
        (torch_cuda.CUDNN, torch.bfloat16, None),
        (torch_cuda.EFFICIENT, torch.float32, None),
        (torch_cuda.EFFICIENT, torch.float16, "bool 2 1 1"),
        (torch_cuda.EFFICIENT, torch.float32, "float 1 4 5"),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_cuda_calls_have_the_right_signature_and_shapes(kernel, dtype, mask):
    """Without a GPU: torch's own shape functions on tensors without data."""
    q, k, v = (torch.empty(2, n, h, 16, dtype=dtype, device="meta") for n, h in ((5, 4), (7, 2), (7, 2)))
    given = None if mask is None else make_mask(mask, 7, 5).to("meta")
    out, lse = kernel.run(q, k, v, given, False, 0.25)
    assert out.shape == (2, 5, 4, 16)
    assert lse.shape == (2, 5, 4)


def test_flash_attn_by_a_stub(monkeypatch):
    def flash_attn_func(q, k, v, softmax_scale, causal, return_attn_probs):
        assert return_attn_probs
        out, lse = reference.run(q, k, v, None, causal, softmax_scale)
        return out, lse.transpose(1, 2), None

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=flash_attn_func))
    q, k, v = tensors(rows=7)
    for causal in (False, True):
        assert_matches(flash_attn.KERNEL.run(q, k, v, None, causal, 0.25), exact(q, k, v, causal=causal))


@pytest.mark.parametrize(("mask", "causal"), [(None, False), (None, True), *((mask, False) for mask in MASKS[1:])])
def test_ascend_by_a_stub(monkeypatch, mask, causal):
    """A stand-in with the documented semantics: atten_mask True drops, pse is added, maximum and sum eight times."""

    def npu_fusion_attention(q, k, v, heads, layout, *, scale, atten_mask=None, pse=None, sparse_mode=0):
        assert (heads, layout) == (4, "BSND")
        rows, keys = q.shape[1], k.shape[1]
        if sparse_mode == 2:
            atten_mask = atten_mask[:rows, :keys]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(heads // k.shape[2], 2)) * scale
        scores = scores if pse is None else scores + pse
        scores = scores if atten_mask is None else scores.masked_fill(atten_mask, -1e4)
        highest = scores.max(-1, keepdim=True).values
        total = (scores - highest).exp().sum(-1, keepdim=True)
        weights = (scores - highest).exp() / total
        out = torch.einsum("bhqk,bkhd->bqhd", weights, v.repeat_interleave(heads // v.shape[2], 2))
        return out, highest.expand(-1, -1, -1, 8), total.expand(-1, -1, -1, 8), None, 0, 0, 0

    monkeypatch.setitem(sys.modules, "torch_npu", types.SimpleNamespace(npu_fusion_attention=npu_fusion_attention))
    rows = 7 if causal else 5
    q, k, v = tensors(rows=rows)
    given = make_mask(mask, 7, rows)
    assert_matches(ascend.KERNEL.run(q, k, v, given, causal, 0.25), exact(q, k, v, given, causal))


def test_kernels_import_without_their_packages():
    for name in ("ascend", "flash_attn"):
        importlib.reload(importlib.import_module(f"multicard.attention.kernels.{name}"))
