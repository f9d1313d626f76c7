"""Prefill and decode of a real model: ours on one rank and two, Hugging Face's generate, and what memory allows.

    python benchmarks/decode.py --model .cache/smollm2 --peers

Contestants alternate in one run; figures are medians. The bound of decoding is the time to read every weight once:
bytes of weights a rank ÷ the bandwidth at which as many ranks or threads read memory at the same time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

import multicard as mc
from common import report
from multicard.mesh import ParallelMesh

PROMPT, NEW = 128, 24
TORCHRUN = """
import sys, time, torch, torch.distributed as dist, transformers
dtype = getattr(torch, sys.argv[2])
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=dtype, tp_plan="auto")
ids = torch.arange(100, 100 + int(sys.argv[3]))[None]
asked = dict(attention_mask=torch.ones_like(ids), do_sample=False)
def timed(new):
    begin = time.perf_counter()
    model.generate(ids, max_new_tokens=new, min_new_tokens=new, **asked)
    return time.perf_counter() - begin
timed(2)
first, whole = timed(1), timed(9)
if dist.get_rank() == 0:
    print("RESULT", first, (whole - first) / 8)
"""


def read_bandwidth(mesh: ParallelMesh, size: int = 64 << 20) -> float:
    """Bytes a second that this rank reads while all ranks do: the best of five sums over float32."""
    held = torch.ones(size)
    best = float("inf")
    for _ in range(5):
        if mesh.world.size > 1:
            torch.distributed.barrier()
        begin = time.perf_counter()
        held.sum()
        best = min(best, time.perf_counter() - begin)
    return held.nbytes / best


class Ours:
    """LLM on ``tp`` ranks with so many threads each."""

    def __init__(self, model: str, dtype: str, tp: int, threads: int) -> None:
        self.llm = mc.LLM(model, tp=tp, dtype=dtype, threads_per_rank=threads)
        self.ranks, self.threads = tp, threads
        self.weights = max(report.parameter_bytes for report in self.llm.load_reports)

    def run(self, ids: list[int]) -> tuple[float, float]:
        timings = self.llm.generate(ids, max_new_tokens=NEW, ignore_eos=True).timings
        return timings["prefill"], timings["decode"] / (NEW - 1)

    def bandwidth(self) -> float:
        config = mc.ParallelConfig(tp=self.ranks)
        return min(mc.launch(read_bandwidth, config, threads_per_rank=self.threads))


class HuggingFace:
    """``generate`` in this process with so many threads."""

    weights = 0

    def __init__(self, model: Any, threads: int) -> None:
        self.model, self.ranks, self.threads = model, 1, threads

    def run(self, ids: list[int]) -> tuple[float, float]:
        torch.set_num_threads(self.threads)
        first, whole = self._timed(ids, 1), self._timed(ids, NEW)
        return first, (whole - first) / (NEW - 1)

    def _timed(self, ids: list[int], new: int) -> float:
        asked = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        begin = time.perf_counter()
        self.model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **asked)
        return time.perf_counter() - begin


def torchrun(model: str, dtype: str, ranks: int) -> tuple[float, float]:
    """Hugging Face's tensor parallel, once: prefill and decode seconds."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "--no-python",
    ]
    command += [sys.executable, "-c", TORCHRUN, model, dtype, str(PROMPT)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    line = next((line for line in done.stdout.splitlines() if "RESULT" in line), None)
    if line is None:
        raise SystemExit(f"Hugging Face under torchrun failed:\n{done.stderr[-2000:]}")
    first, each = line.split("RESULT")[1].split()
    return float(first), float(each)


def contestants(args: argparse.Namespace) -> dict[str, Ours | HuggingFace]:
    threads = len(os.sched_getaffinity(0))
    found: dict[str, Ours | HuggingFace] = {
        "ours tp=1, 1 thread": Ours(args.model, args.dtype, 1, 1),
        "ours tp=2, 1 thread each": Ours(args.model, args.dtype, 2, 1),
    }
    if threads > 1:
        found[f"ours tp=1, {threads} threads"] = Ours(args.model, args.dtype, 1, threads)
    if args.peers:
        import transformers

        dtype = getattr(torch, args.dtype)
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
        found["Hugging Face, 1 thread"] = HuggingFace(model, 1)
        if threads > 1:
            found[f"Hugging Face, {threads} threads"] = HuggingFace(model, threads)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".cache/smollm2")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", action="store_true", help="Hugging Face generate beside ours")
    parser.add_argument("--torchrun", type=int, default=0, help="Hugging Face TP on so many ranks (3 divides SmolLM2)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    ids = list(range(100, 100 + PROMPT))
    running = contestants(args)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
    for round_ in range(args.rounds + 1):
        for name, contestant in running.items():
            timed = contestant.run(ids)
            if round_:  # the first warms up
                times[name].append(timed)
    rows = []
    for name, contestant in running.items():
        prefill, decode = (statistics.median(column) for column in zip(*times[name], strict=True))
        row = {"who": name, "prefill ms": prefill * 1e3, "decode ms/token": decode * 1e3, "tokens/s": 1 / decode}
        bound = contestant.weights / contestant.bandwidth() if isinstance(contestant, Ours) else None
        rows.append({**row, "bound ms": bound and bound * 1e3, "of the bound": bound and bound / decode})
    for contestant in running.values():
        if isinstance(contestant, Ours):
            contestant.llm.close()
    if args.torchrun:
        prefill, decode = torchrun(args.model, args.dtype, args.torchrun)
        name = f"Hugging Face TP={args.torchrun}, torchrun (gloo)"
        row = {"who": name, "prefill ms": prefill * 1e3, "decode ms/token": decode * 1e3, "tokens/s": 1 / decode}
        rows.append({**row, "bound ms": None, "of the bound": None})
    report(rows, args.json, model=args.model, dtype=args.dtype, prompt=PROMPT, new=NEW, rounds=args.rounds)


if __name__ == "__main__":
    main()
