"""A pipeline's text encoder on two ranks of one thread: whole on both, as without splitting, and split over them.

    python benchmarks/text_encoder.py --rounds 5

T5-base's encoder with random weights, 128 tokens. "bound" is the same ranks doing the same local work at the same time
with every exchange taken out. Every round runs every contestant; figures are medians.
"""

from __future__ import annotations

import argparse
import contextlib
import functools

import torch

import multicard as mc
from common import alternate, report, without_exchanges
from multicard import collectives
from multicard.integrations.styles import make
from multicard.integrations.transformers.part import weight_changes

BASE = {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12}


def build(mesh: mc.ParallelMesh, split: bool) -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    model = transformers.T5EncoderModel(transformers.T5Config(**BASE, feed_forward_proj="gated-gelu"))
    model = model.eval().requires_grad_(False)
    if split:
        make(weight_changes(model, mesh.by_weights()))
    return model


def encode(mesh: mc.ParallelMesh, model: torch.nn.Module, tokens: int, exchanges: bool = True) -> None:
    ids = torch.arange(3, tokens + 3)[None]
    with torch.no_grad(), contextlib.nullcontext() if exchanges else without_exchanges():
        model(ids)
    collectives.barrier(mesh.world)


def held(mesh: mc.ParallelMesh, model: torch.nn.Module) -> float:
    return sum(parameter.nbytes for parameter in model.parameters()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with mc.Ranks(mc.ParallelConfig(cfg=2), threads_per_rank=1, timeout=300.0) as ranks:
        kept = {"whole on both ranks": ranks.keep(build, False), "split over both": ranks.keep(build, True)}
        contestants = {name: functools.partial(ranks.run, encode, model, given.tokens) for name, model in kept.items()}
        split = kept["split over both"]
        contestants["bound"] = functools.partial(ranks.run, encode, split, given.tokens, False)
        times = alternate(contestants, given.rounds)
        sizes = {name: max(ranks.run(held, model)) for name, model in kept.items()}
    rows = [
        {"contestant": name, "ms": seconds * 1e3, "MB a rank": sizes.get(name, "")} for name, seconds in times.items()
    ]
    report(rows, given.json, tokens=given.tokens)


if __name__ == "__main__":
    main()
