"""Prefill and decode of a real model: ours on one rank and two, llama.cpp, Hugging Face, and what memory allows.

    python benchmarks/decode.py --peers --dtype bfloat16
    python benchmarks/decode.py --peers --dtype Q4_1
    python benchmarks/decode.py --peers --batch 32

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
from llama_cpp import LlamaCpp, weights
from multicard.mesh import ParallelMesh

PROMPT, NEW = 128, 24
QUANTIZED = ("Q4_1", "Q8_0")  # SmolLM2 as a GGUF file
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

    def __init__(self, model: str, dtype: str, tp: int, threads: int, compile: bool | str = True) -> None:
        self.llm = mc.LLM(model, tp=tp, dtype=dtype, threads_per_rank=threads, compile=compile)
        self.ranks, self.threads = tp, threads
        self.weights = max(report.parameter_bytes for report in self.llm.load_reports)

    def run(self, ids: list[int], new: int) -> tuple[float, float]:
        timings = self.llm.generate(ids, max_new_tokens=new, ignore_eos=True).timings
        return timings["prefill"], timings["decode"] / (new - 1)

    def batch(self, prompts: list[list[int]], new: int) -> float:
        """Tokens a second after the first ones, of all prompts together."""
        answers = self.llm.generate(prompts, max_new_tokens=new, ignore_eos=True)
        return len(prompts) * answers[0].timings["tokens_per_second"]

    def bandwidth(self) -> float:
        config = mc.ParallelConfig(tp=self.ranks)
        return min(mc.launch(read_bandwidth, config, threads_per_rank=self.threads))

    def close(self) -> None:
        self.llm.close()


class HuggingFace:
    """``generate`` in this process with so many threads."""

    def __init__(self, model: Any, threads: int) -> None:
        self.model, self.threads = model, threads

    def run(self, ids: list[int], new: int) -> tuple[float, float]:
        first, whole = self._timed([ids], 1), self._timed([ids], new)
        return first, (whole - first) / (new - 1)

    def batch(self, prompts: list[list[int]], new: int) -> float:
        first, whole = self._timed(prompts, 1), self._timed(prompts, new)
        return len(prompts) * (new - 1) / (whole - first)

    def close(self) -> None:
        pass

    def _timed(self, prompts: list[list[int]], new: int) -> float:
        torch.set_num_threads(self.threads)
        asked = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        begin = time.perf_counter()
        self.model.generate(ids, attention_mask=mask, **asked)
        return time.perf_counter() - begin


Contestant = Ours | HuggingFace | LlamaCpp


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


def contestants(args: argparse.Namespace) -> dict[str, Contestant]:
    threads, slots, dtype = len(os.sched_getaffinity(0)), args.batch or 1, args.dtype
    counts = (1, threads) if threads > 1 else (1,)
    found: dict[str, Contestant] = {}
    model, numbers = (str(weights(dtype)), "float32") if dtype in QUANTIZED else (args.model, dtype)
    for count in counts:
        found[f"ours, {_plural(count)}"] = Ours(model, numbers, 1, count)
    found["ours tp=2, 1 thread each"] = Ours(model, numbers, 2, 1)
    if args.uncompiled:
        found["ours uncompiled, 1 thread"] = Ours(model, numbers, 1, 1, compile=False)
    if args.peers:
        for count in counts:
            found[f"llama.cpp, {_plural(count)}"] = LlamaCpp(dtype, count, slots)
    if args.peers and dtype not in QUANTIZED:
        import transformers

        theirs = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, dtype)).eval()
        for count in counts:
            found[f"Hugging Face, {_plural(count)}"] = HuggingFace(theirs, count)
    return found


def _plural(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def single(running: dict[str, Contestant], rounds: int) -> list[dict[str, Any]]:
    """One prompt: prefill, decode, and the part of the bound that decoding reaches."""
    ids = list(range(100, 100 + PROMPT))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
    for round_ in range(rounds + 1):
        for name, contestant in running.items():
            timed = contestant.run(ids, NEW)
            if round_:  # the first warms up
                times[name].append(timed)
    rows = []
    for name, contestant in running.items():
        prefill, decode = (statistics.median(column) for column in zip(*times[name], strict=True))
        row = {"who": name, "prefill ms": prefill * 1e3, "decode ms/token": decode * 1e3, "tokens/s": 1 / decode}
        bound = contestant.weights / contestant.bandwidth() if isinstance(contestant, Ours) else None
        rows.append({**row, "bound ms": bound and bound * 1e3, "of the bound": bound and bound / decode})
    return rows


def batches(running: dict[str, Contestant], rounds: int, size: int) -> list[dict[str, Any]]:
    """So many prompts of very different lengths: tokens a second of all together."""
    prompts = [list(range(100 + i, 104 + i + i * 37 % 120)) for i in range(size)]
    rates: dict[str, list[float]] = {name: [] for name in running}
    for round_ in range(rounds + 1):
        for name, contestant in running.items():
            rate = contestant.batch(prompts, NEW)
            if round_:
                rates[name].append(rate)
    return [{"who": name, "tokens/s of all": statistics.median(each)} for name, each in rates.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".cache/smollm2")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", *QUANTIZED])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=0, help="so many prompts at once, of very different lengths")
    parser.add_argument("--peers", action="store_true", help="llama.cpp (SmolLM2 only) and Hugging Face beside ours")
    parser.add_argument("--uncompiled", action="store_true", help="ours with compile=False too")
    parser.add_argument("--torchrun", type=int, default=0, help="Hugging Face TP on so many ranks (3 divides SmolLM2)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    running = contestants(args)
    rows = batches(running, args.rounds, args.batch) if args.batch else single(running, args.rounds)
    for contestant in running.values():
        contestant.close()
    if args.torchrun:
        prefill, decode = torchrun(args.model, args.dtype, args.torchrun)
        name = f"Hugging Face TP={args.torchrun}, torchrun (gloo)"
        row = {"who": name, "prefill ms": prefill * 1e3, "decode ms/token": decode * 1e3, "tokens/s": 1 / decode}
        rows.append({**row, "bound ms": None, "of the bound": None})
    about = {"batch": args.batch} if args.batch else {"prompt": PROMPT}
    report(rows, args.json, model=args.model, dtype=args.dtype, new=NEW, rounds=args.rounds, **about)


if __name__ == "__main__":
    main()
