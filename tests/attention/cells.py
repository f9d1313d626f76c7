"""Cells of attention: everything that may vary in one call, the call itself on a rank, and the float64 oracle."""

import dataclasses
import math
import random

import torch

import multicard as mc
from multicard import attention, partition

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 5e-3}


@dataclasses.dataclass(frozen=True)
class Cell:
    seed: int = 0
    batch: int = 1
    seq_len: int = 13
    kv_seq_len: int | None = None  # None: self-attention
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 8
    value_dim: int = 8
    dtype: torch.dtype = torch.float32
    causal: bool = False
    order: str = "contiguous"
    key_mask: str | None = None  # "random", "padding", "none left"
    mask: str | None = None  # "bool" or "float", then which of batch and heads are 1: "bool 1h", "float b1", ...
    joint: int | None = None  # joint tokens
    joint_position: str = "front"
    joint_masked: bool = False
    replicated_kv: bool = False
    positions: str | None = None  # "shifted", "shuffled"
    scale: float | None = None
    layout: str = "BSND"
    strided: bool = False
    schedule: str = "auto"

    @property
    def keys(self) -> int:
        return self.seq_len if self.kv_seq_len is None else self.kv_seq_len


@dataclasses.dataclass
class Inputs:
    """Whole tensors, the same on every rank."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    joint: tuple | None
    key_mask: torch.Tensor | None
    mask: torch.Tensor | None
    joint_key_mask: torch.Tensor | None
    q_positions: torch.Tensor | None
    kv_positions: torch.Tensor | None


def inputs(cell: Cell) -> Inputs:
    generator = torch.Generator().manual_seed(cell.seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(cell.dtype)

    def coin(*shape, p=0.6):
        return torch.rand(*shape, generator=generator) < p

    B, S, T = cell.batch, cell.seq_len, cell.keys
    dims = ((cell.heads, cell.head_dim), (cell.kv_heads, cell.head_dim), (cell.kv_heads, cell.value_dim))
    q, k, v = (normal(B, n, *shape) for n, shape in zip((S, T, T), dims, strict=True))
    joint = None if cell.joint is None else tuple(normal(B, cell.joint, *shape) for shape in dims)
    key_mask = None
    if cell.key_mask == "random":
        key_mask = coin(B, T)
    elif cell.key_mask == "padding":
        lengths = torch.randint(0, T + 1, (B, 1), generator=generator)
        key_mask = torch.arange(T) < lengths
    elif cell.key_mask == "none left":
        key_mask = torch.zeros(B, T, dtype=torch.bool)
    mask = None
    if cell.mask:
        kind, which = cell.mask.split()
        shape = (B if which[0] == "b" else 1, cell.heads if which[1] == "h" else 1, S, T)
        mask = coin(*shape)
        if kind == "float":
            mask = torch.randn(*shape, generator=generator).masked_fill(~mask, -math.inf)
        if S:
            mask[:, :, torch.randint(S, (1,), generator=generator)] = False if kind == "bool" else -math.inf
    q_positions = kv_positions = None
    if cell.positions == "shifted":  # a second chunk of a prefill over a cache
        q_positions, kv_positions = torch.arange(S) + T // 2, torch.arange(T)
    elif cell.positions == "shuffled":
        q_positions = torch.randint(0, max(1, T), (S,), generator=generator)
        kv_positions = torch.randperm(T, generator=generator)
    joint_key_mask = coin(B, cell.joint) if cell.joint is not None and cell.joint_masked else None
    return Inputs(q, k, v, joint, key_mask, mask, joint_key_mask, q_positions, kv_positions)


def oracle(cell: Cell, whole: Inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention on one card in float64, by the formula; joint tokens in front."""
    q, k, v = whole.q.double(), whole.k.double(), whole.v.double()
    B, S, T = cell.batch, cell.seq_len, cell.keys
    bias = torch.zeros(B, cell.heads, S, T, dtype=torch.float64)
    if whole.mask is not None:
        bias = bias + (whole.mask.double() if whole.mask.is_floating_point() else log_of(whole.mask))
    if cell.causal:
        q_at = torch.arange(S) + T - S if whole.q_positions is None else whole.q_positions
        k_at = torch.arange(T) if whole.kv_positions is None else whole.kv_positions
        bias = bias + log_of(k_at <= q_at[:, None])
    joint = cell.joint or 0
    if whole.joint is not None:
        q, k, v = (torch.cat([j.double(), x], 1) for j, x in zip(whole.joint, (q, k, v), strict=True))
        bias = torch.nn.functional.pad(bias, (joint, 0, joint, 0))
    if whole.key_mask is not None:
        bias[..., joint:] += log_of(whole.key_mask)[:, None, None]
    if whole.joint_key_mask is not None:
        bias[..., :joint] += log_of(whole.joint_key_mask)[:, None, None]
    group = cell.heads // cell.kv_heads
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scale = cell.head_dim**-0.5 if cell.scale is None else cell.scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale + bias
    weights = scores.softmax(-1).nan_to_num(0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    return out[:, joint:], out[:, :joint] if whole.joint is not None else None


def log_of(keep: torch.Tensor) -> torch.Tensor:
    return torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, -math.inf)


def attend_on(mesh, cell: Cell, whole: Inputs):
    """The call on this rank, with this rank's slices: ``(out, joint_out or None)``, both in BSND."""

    def mine(x, dim=1):
        return None if x is None else attention.shard_sequence(x, mesh, dim, cell.order)

    def keys(x, dim=1):
        return x if cell.replicated_kv else mine(x, dim)

    def laid_out(x):
        if cell.strided:  # every other element of something twice as large
            x = torch.stack([x, x], -1).flatten(-2)[..., ::2]
        return x.transpose(1, 2) if cell.layout == "BNSD" else x

    result = attention.attend(
        *(laid_out(x) for x in (mine(whole.q), keys(whole.k), keys(whole.v))),
        mesh=mesh,
        causal=cell.causal,
        key_mask=keys(whole.key_mask),
        mask=mine(whole.mask, 2),
        scale=cell.scale,
        layout=cell.layout,
        seq_len=cell.seq_len,
        kv_seq_len=cell.kv_seq_len,
        replicated_kv=cell.replicated_kv,
        order=cell.order,
        q_positions=mine(whole.q_positions, 0),
        kv_positions=keys(whole.kv_positions, 0),
        joint=None if whole.joint is None else tuple(laid_out(x) for x in whole.joint),
        joint_position=cell.joint_position,
        joint_key_mask=whole.joint_key_mask,
        schedule=cell.schedule,
    )
    out, joint_out = result if whole.joint is not None else (result, None)
    if cell.layout == "BNSD":
        out, joint_out = out.transpose(1, 2), None if joint_out is None else joint_out.transpose(1, 2)
    return out, joint_out


def solved(cell: Cell) -> tuple[Inputs, tuple[torch.Tensor, torch.Tensor | None]]:
    whole = inputs(cell)
    return whole, oracle(cell, whole)


def check(mesh, cells: list[Cell], known=None):
    """On a rank: for every cell its error as a share of the tolerance (of the largest value), and joint_out.

    ``known``: what :func:`solved` gives for each cell; ranks that are threads share it.
    """
    results = []
    for cell, (whole, (wanted, joint_wanted)) in zip(cells, known or map(solved, cells), strict=True):
        try:
            out, joint_out = attend_on(mesh, cell, whole)
        except Exception as error:
            raise AssertionError(f"{cell} on {mesh.config}") from error
        span = attention.shard_sequence(wanted, mesh, 1, cell.order)
        assert out.shape == span.shape, (cell, out.shape, span.shape)
        assert out.dtype == cell.dtype
        largest = max([x.abs().max().item() for x in (wanted, joint_wanted) if x is not None and x.numel()], default=0)
        pairs = [(out, span), (joint_out, joint_wanted)]
        error = max([(a.double() - b).abs().max().item() for a, b in pairs if a is not None and a.numel()], default=0.0)
        error = math.inf if any(a is not None and a.isnan().any() for a, _ in pairs) else error
        results.append((error / (TOLERANCE[cell.dtype] * (largest or 1.0)), joint_out))
    return results


def assert_exact(by_rank, cells: list[Cell]) -> None:
    """Every rank within tolerance in every cell, and joint_out with the same bits everywhere."""
    wrong = [
        f"{cell} on rank {rank}: {results[i][0]:.3g} times the tolerance"
        for i, cell in enumerate(cells)
        for rank, results in enumerate(by_rank)
        if not results[i][0] <= 1
    ]
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong[:20])
    for i, cell in enumerate(cells):
        if cell.joint is not None:
            assert all(torch.equal(results[i][1], by_rank[0][i][1]) for results in by_rank), cell


def random_cell(rng: random.Random, ranks: int) -> Cell:
    """Any cell that isn't refused; lengths around and below the number of ranks are as likely as others."""
    kv_heads = rng.choice([1, 1, 2, 3, 4])
    heads = kv_heads * rng.choice([1, 1, 2, 3, 5])
    seq_len = rng.choice([rng.randrange(0, 2 * ranks + 2), rng.randrange(60)])
    kv_seq_len = rng.choice([None, None, rng.randrange(0, 50), seq_len + rng.randrange(20)])
    head_dim = rng.choice([4, 8, 16, 12])
    causal = rng.random() < 0.45
    positions = rng.choice([None, None, "shifted", "shuffled"]) if causal else None
    return Cell(
        seed=rng.randrange(1 << 30),
        batch=rng.choice([1, 1, 2, 3]),
        seq_len=seq_len,
        kv_seq_len=kv_seq_len,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=rng.choice([head_dim, head_dim, 4, 24]),
        dtype=rng.choice([torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16]),
        causal=causal,
        order=rng.choice(partition.ORDERS),
        key_mask=rng.choice([None, None, "random", "padding", "none left"]),
        mask=rng.choice([None, None, *(f"{kind} {which}" for kind in ("bool", "float") for which in MASK_SHAPES)]),
        joint=None if causal else rng.choice([None, None, 0, 1, 5, 11]),
        joint_position=rng.choice(["front", "rear"]),
        joint_masked=rng.random() < 0.5,
        replicated_kv=rng.random() < 0.15,
        positions=positions,
        scale=rng.choice([None, None, 0.3]),
        layout=rng.choice(["BSND", "BSND", "BNSD"]),
        strided=rng.random() < 0.2,
        schedule=rng.choice(["auto", "ulysses", "ring", "hybrid"]),
    )


MASK_SHAPES = ("bh", "b1", "1h", "11")


def mesh_sizes(ranks: int) -> list[mc.ParallelConfig]:
    """Every way to spread so many ranks over ring and Ulysses."""
    return [mc.ParallelConfig(ring=r, ulysses=ranks // r) for r in range(1, ranks + 1) if ranks % r == 0]
