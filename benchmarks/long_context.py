"""Prefilling long prompts through transformers: ranks of one thread that share the sequence, against one process.

    python benchmarks/long_context.py [--model .cache/smollm2] [--ranks 2] [--lengths 4000 8000] [--json]

The bound is free of communication: one process's time over the ranks, or over the cores if there are fewer. One
process computes with the same kernels, and a split can beat the bound where they are faster on fewer rows (caches).
``kv`` is the cache's size a rank, ``peak`` the most that a rank held above what it held after loading.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import time

import torch
from torch import nn

import common
import multicard as mc


class Slot:
    """Where a rank keeps its model.

    Attributes:
        held: bytes in memory once it was loaded.
    """

    model: nn.Module
    held: int


def load(mesh: mc.ParallelMesh, path: str) -> Slot:
    slot = Slot()
    slot.model = mc.from_pretrained(path, mesh, dtype=torch.float32)
    slot.held = resident("VmRSS")
    return slot


def resident(field: str) -> int:
    """Bytes of this process in memory: now (``VmRSS``) or at most (``VmHWM``)."""
    found = re.search(rf"{field}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def prefill(mesh: mc.ParallelMesh, slot: Slot, length: int) -> tuple[float, int, int, int]:
    """Seconds, the cache's bytes here, the peak's bytes above the loaded model, and the next token."""
    ids = torch.randint(3, 40000, (1, length), generator=torch.Generator().manual_seed(0))
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    begin = time.perf_counter()
    with torch.inference_mode():
        out = slot.model(ids, use_cache=True, logits_to_keep=1)
    seconds = time.perf_counter() - begin
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    return seconds, cache, resident("VmHWM") - slot.held, int(out.logits[0, -1].argmax())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".cache/smollm2")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4000, 8000])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    meshes = {"one process": {}, f"ring={args.ranks}": {"ring": args.ranks}}
    meshes[f"ulysses={args.ranks}"] = {"ulysses": args.ranks}
    pools = {name: mc.Ranks(mc.ParallelConfig(**degrees), threads_per_rank=1) for name, degrees in meshes.items()}
    rows = []
    try:
        slots = {name: ranks.keep(load, args.model) for name, ranks in pools.items()}
        for length in sorted(args.lengths):
            runs = {name: [] for name in pools}
            for _ in range(args.rounds):
                for name, ranks in pools.items():
                    runs[name].append(ranks.run(prefill, slots[name], length))
            one = min(each[0][0] for each in runs["one process"])
            for name, each in runs.items():
                seconds = min(run[0][0] for run in each)
                bound = one / min(len(each[0]), common.machine()["cores"])
                rows.append(
                    {
                        "tokens": length,
                        "mesh": name,
                        "seconds": seconds,
                        "× one": one / seconds,
                        "of bound": bound / seconds,
                        "kv MiB": each[0][0][1] / 2**20,
                        "peak MiB": max(rank[2] for rank in each[0]) / 2**20,
                        "same token": each[0][0][3] == runs["one process"][0][0][3],
                    }
                )
    finally:
        for ranks in pools.values():
            ranks.close()
    common.report(rows, args.json, model=args.model, threads_per_rank=1)


if __name__ == "__main__":
    main()
