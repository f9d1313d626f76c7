"""Start-up: from a call or a command to the first value, beside torchrun.

    python benchmarks/start.py --model .cache/smollm2 --rounds 5

Whole processes are timed, from the command to its end, and calls within this one. Without the fork server every rank is
a fresh process that imports torch by itself. Every function makes one all-reduce.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from unittest import mock

import torch

import multicard as mc
from common import alternate, report
from multicard import collectives
from multicard.ranks import starter

LAUNCH = """
import multicard as mc

def work(mesh):
    import torch
    from multicard import collectives
    return collectives.all_reduce(torch.ones(1), mesh.world).item()

print(mc.launch(work, mc.ParallelConfig(tp={size})))
"""
TORCHRUN = """
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
x = torch.ones(1)
dist.all_reduce(x)
print(x.item())
"""
FRESH = """
from multicard.ranks import starter
starter.server = lambda *_: None
"""
GENERATE = "import sys\nfrom multicard.cli import main\nmain(sys.argv[1:])"


def run(*command: str) -> None:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def call(size: int, served: bool) -> None:
    with contextlib.nullcontext() if served else mock.patch.object(starter, "server", return_value=None):
        mc.launch(work, mc.ParallelConfig(tp=size))


def work(mesh: mc.ParallelMesh) -> float:
    return collectives.all_reduce(torch.ones(1), mesh.world).item()


def contestants(size: int, model: str | None, folder: pathlib.Path) -> dict[str, Callable[[], object]]:
    """What is timed, by name; scripts are written to ``folder``."""
    scripts = {"launch": LAUNCH.format(size=size), "torchrun": TORCHRUN}
    scripts["fresh"] = FRESH + scripts["launch"]
    for name, code in scripts.items():
        (folder / f"{name}.py").write_text(code)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size))
    found: dict[str, Callable[[], object]] = {
        "process: torchrun": functools.partial(run, *torchrun, str(folder / "torchrun.py")),
        "process: mc.launch, no fork server": functools.partial(run, str(folder / "fresh.py")),
        "process: mc.launch": functools.partial(run, str(folder / "launch.py")),
        "call: mc.launch, no fork server": functools.partial(call, size, served=False),
        "call: mc.launch, again": functools.partial(call, size, served=True),
    }
    if model:
        first = ("generate", "--model", model, "--tp", str(size), "--max-new-tokens", "1", "Hello")
        found["process: generate, no fork server"] = functools.partial(run, "-c", FRESH + GENERATE, *first)
        found["process: generate"] = functools.partial(run, "-c", GENERATE, *first)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", help="a Hugging Face checkpoint, for `multicard generate` to its first token")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = alternate(contestants(args.ranks, args.model, pathlib.Path(folder)), args.rounds)
    load = round(os.getloadavg()[0], 1)
    rows = [{"start": name, "seconds": median} for name, median in seconds.items()]
    report(rows, args.json, ranks=args.ranks, rounds=args.rounds, load=load)


if __name__ == "__main__":
    main()
