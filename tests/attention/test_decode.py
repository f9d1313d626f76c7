"""Decoding over a cache that ranks hold in parts of any length."""

import random

import torch
from test_kernels import exact
from threads import run_threads

import multicard as mc
from multicard import attention


def cache_cells(ranks, count, seed):
    """(lengths by rank, batch, new tokens, heads, kv heads, dtype, what masks it)"""
    rng = random.Random(seed)
    for _ in range(count):
        lengths = [rng.choice([0, 0, 1, rng.randrange(20)]) for _ in range(ranks)]
        kv_heads = rng.choice([1, 2, 3])
        heads = kv_heads * rng.choice([1, 3, 4])
        dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16])
        masked = rng.choice([None, "kv_lengths", "key_mask", "both", "mask"])
        yield lengths, rng.choice([1, 3]), rng.choice([1, 2, 5]), heads, kv_heads, dtype, masked, rng.randrange(1 << 30)


def decode(mesh, cells):
    """On a rank: for every cell the output's error, its tolerance, and the output."""
    axis, results = mesh.sequence, []
    for lengths, batch, new, heads, kv_heads, dtype, masked, seed in cells:
        generator = torch.Generator().manual_seed(seed)
        total = sum(lengths)
        q = torch.randn(batch, new, heads, 16, generator=generator).to(dtype)
        k = torch.randn(batch, total, kv_heads, 16, generator=generator).to(dtype)
        v = torch.randn(batch, total, kv_heads, 8, generator=generator).to(dtype)
        coins = torch.rand(batch, heads, new, total, generator=generator) < 0.6
        used = torch.cat([torch.arange(n) < torch.randint(n + 1, (batch, 1), generator=generator) for n in lengths], 1)
        keep = torch.ones(batch, 1, 1, total, dtype=torch.bool)
        mine = slice(sum(lengths[: axis.rank]), sum(lengths[: axis.rank + 1]))
        given = {}
        if masked in ("kv_lengths", "both"):
            keep = keep & used[:, None, None]
            given["kv_lengths"] = used[:, mine].sum(1)
        if masked in ("key_mask", "both"):
            keep = keep & coins[:, :1, :1]
            given["key_mask"] = coins[:, 0, 0, mine]
        if masked == "mask":
            keep = coins
            given["mask"] = coins[..., mine]
        out = attention.attend_decode(q, k[:, mine], v[:, mine], axis=axis, scale=0.25, **given)
        wanted = exact(q, k, v, keep)[0]
        tolerance = (1e-5 if dtype == torch.float32 else 1e-2) * max(1.0, wanted.abs().max().item() if total else 0)
        assert out.dtype == dtype
        results.append(((out.double() - wanted).abs().max().item(), tolerance, out))
    return results


def assert_decodes(by_rank, cells):
    for i, cell in enumerate(cells):
        for results in by_rank:
            error, tolerance, out = results[i]
            assert error <= tolerance, cell
            assert torch.equal(out, by_rank[0][i][2]), f"not the same bits on every rank: {cell}"


def test_decode_on_real_ranks(run_on):
    for degrees in ({"ring": 2}, {"ring": 3}, {"ring": 2, "ulysses": 2}):
        ranks = mc.ParallelConfig(**degrees).world_size
        cells = list(cache_cells(ranks, 60, ranks))
        assert_decodes(run_on(decode, cells, **degrees), cells)


def test_decode_on_threads():
    for ranks in (1, 5, 8):
        cells = list(cache_cells(ranks, 40, ranks))
        assert_decodes(run_threads(decode, cells, ulysses=ranks), cells)


def test_an_empty_cache_gives_zeros():
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 0, 2, 8)
    out = attention.attend_decode(q, k, k, axis=mc.single().sequence)
    assert out.shape == q.shape
    assert not out.any()
