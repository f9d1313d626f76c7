"""Decoding SmolLM2 through transformers: ours in place against transformers' own tensor parallel and one process.

    python benchmarks/transformers_tp.py [--model .cache/smollm2] [--json]

Every contestant generates the same tokens in turn, in ranks of one thread each; a row is the median of the rounds. The
bound of tensor parallel is the degree, or the cores if there are fewer: weights are read by that many at once.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

import common
import multicard as mc

PROMPT, NEW = 16, 24


class Slot:
    """Where a rank keeps its model."""

    model: nn.Module


def plain(mesh: mc.ParallelMesh, path: str) -> Slot:
    from transformers import AutoModelForCausalLM

    slot = Slot()
    slot.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return slot


def theirs(mesh: mc.ParallelMesh, path: str) -> Slot:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    slot = Slot()
    config = DistributedConfig(tp_size=mesh.tp.size)
    slot.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, distributed_config=config)
    return slot


def ours(mesh: mc.ParallelMesh, path: str) -> Slot:
    slot = Slot()
    slot.model = mc.from_pretrained(path, mesh, dtype=torch.float32)
    return slot


def decode(mesh: mc.ParallelMesh, slot: Slot, new: int, compiled: bool) -> tuple[float, list[int]]:
    ids, options = torch.arange(100, 100 + PROMPT)[None], static() if compiled else {}
    begin = time.perf_counter()
    with torch.inference_mode():
        out = slot.model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options)
    return time.perf_counter() - begin, out[0, PROMPT:].tolist()


def static() -> dict[str, object]:
    """A static cache, for which ``generate`` compiles its step; on a CPU only if told so."""
    from transformers import CompileConfig

    config = CompileConfig(mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def start(name: str, load, degree: int, backend: str, path: str, compiled: bool):
    """A contestant's ranks with its model loaded, or why it doesn't run."""
    ranks = mc.Ranks(mc.ParallelConfig(tp=degree), backend=backend, threads_per_rank=1, timeout=300)
    try:
        slot = ranks.keep(load, path)
        tokens = ranks.run(decode, slot, NEW, compiled)[0][1]
        return ranks, lambda: ranks.run(decode, slot, NEW, compiled)[0][0], tokens
    except Exception as error:  # a peer that doesn't run is a result
        ranks.close()
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:90]}", None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".cache/smollm2")
    parser.add_argument("--degrees", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="also with a static cache and a compiled step")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    plan = [("one process", plain, 1, "auto", False)]
    for degree in args.degrees:
        plan += [
            (f"transformers tp={degree}", theirs, degree, "gloo", False),
            (f"multicard tp={degree}", ours, degree, "auto", False),
        ]
    if args.compiled:
        plan += [(f"{name}, compiled", load, *how, True) for name, load, *how, _ in plan]
    running, rows = {}, []
    try:
        for name, load, degree, backend, compiled in plan:
            running[name] = start(name, load, degree, backend, args.model, compiled)
        contestants = {name: call for name, (ranks, call, _) in running.items() if ranks}
        seconds = common.alternate(contestants, args.rounds)
        alone = running["one process"][2]
        for name, (_, call, tokens) in running.items():
            rate = NEW / seconds[name] if name in seconds else None
            speedup = seconds["one process"] / seconds[name] if rate else None
            result = "same tokens" if tokens == alone else "OTHER TOKENS" if tokens else call
            rows.append({"contestant": name, "tokens/s": rate or 0.0, "× one": speedup or 0.0, "result": result})
    finally:
        for ranks, *_ in running.values():
            if ranks:
                ranks.close()
    import transformers

    bound = f"min(degree, cores) = {[min(d, common.machine()['cores']) for d in args.degrees]}"
    common.report(rows, args.json, transformers=transformers.__version__, model=args.model, bound=bound)


if __name__ == "__main__":
    main()
