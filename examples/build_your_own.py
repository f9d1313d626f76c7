"""A small transformer of your own out of parallel layers, on any number of ranks:

    multicard run --tp 2 examples/build_your_own.py

Every rank draws the same weights from the same seed, keeps its own part of them, and compares with the whole network,
which it runs by itself. A layer of yours takes an axis of the mesh; on an axis of one rank it is the plain layer.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import multicard as mc
from multicard import partition


class Block(nn.Module):
    """The plain layer: norm, attention, norm, MLP."""

    def __init__(self, hidden: int, ffn: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.q, self.k, self.v = (nn.Linear(hidden, hidden) for _ in range(3))
        self.out = nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.out(attention(self.q(h), self.k(h), self.v(h), self.heads))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ParallelBlock(nn.Module):
    """The same with its heads and its MLP's rows split over an axis: two all-reduces."""

    def __init__(self, block: Block, axis: mc.Axis) -> None:
        super().__init__()
        self.norm1, self.norm2 = block.norm1, block.norm2
        dim = block.out.in_features // block.heads
        heads = partition.split(block.heads, axis.size)  # whole heads, however many ranks
        self.heads = len(heads[axis.rank])
        shares = [[range(own.start * dim, own.stop * dim)] for own in heads]
        self.q, self.k, self.v = (
            mc.ColumnParallelLinear.from_linear(linear, axis, shares=shares) for linear in (block.q, block.k, block.v)
        )
        self.out = mc.RowParallelLinear.from_linear(block.out, axis, shares=shares)
        self.up = mc.ColumnParallelLinear.from_linear(block.up, axis)
        self.down = mc.RowParallelLinear.from_linear(block.down, axis)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.out(attention(self.q(h), self.k(h), self.v(h), self.heads))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Causal attention of so many heads; ``(batch, tokens, heads·dim)`` each."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def show_shapes(network: nn.Module) -> None:
    """Print what the first rank gets out of the embedding, the first block's layers and the head."""
    kinds = (mc.VocabParallelEmbedding, mc.ColumnParallelLinear, mc.RowParallelLinear, mc.ParallelLMHead)
    for name, layer in network.named_modules():
        if isinstance(layer, kinds) and not name.startswith(tuple(f"{i}." for i in range(2, 100))):
            said = f"{name:8}{type(layer).__name__:24}"
            layer.register_forward_hook(lambda layer, args, out, said=said: print(said, tuple(out.shape)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("vocab", 32000), ("hidden", 1024), ("ffn", 4096), ("layers", 4), ("heads", 8), ("tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    mesh = mc.init_mesh()

    torch.manual_seed(0)  # the same weights and input on every rank: without it ranks would add up different networks
    blocks = [Block(args.hidden, args.ffn, args.heads) for _ in range(args.layers)]
    head = nn.Linear(args.hidden, args.vocab, bias=False)
    whole = nn.Sequential(nn.Embedding(args.vocab, args.hidden), *blocks, nn.LayerNorm(args.hidden), head)
    ids = torch.randint(args.vocab, (1, args.tokens))
    split = nn.Sequential(
        mc.VocabParallelEmbedding.from_embedding(whole[0], mesh.tp),
        *(ParallelBlock(block, mesh.tp) for block in blocks),
        whole[-2],
        mc.ParallelLMHead.from_linear(whole[-1], mesh.tp, gather_output=True),
    )
    with torch.inference_mode():
        if mesh.rank == 0:
            show_shapes(split)
        ours, expected = split(ids), whole(ids)
    difference = (ours - expected).abs().max() / expected.abs().max()
    if mesh.rank == 0:
        print(f"{mesh.config}: largest difference from one card {difference:.2g} of the largest logit")
    assert difference < 1e-5, difference


if __name__ == "__main__":
    main()
