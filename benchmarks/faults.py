"""How long after a rank's fault its caller has the error, and nothing is left; and what the check costs.

    python benchmarks/faults.py [--json] [--rounds 5] [--parts faults llm check peers]

There is no bound but the launcher's own graces: an exception is told at once where another rank waits in a collective
for the one that raised, and after 0.5 s where the others are still computing; a hang after the collective's timeout,
which is 2 s here.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import multicard as mc
from multicard import collectives

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))

import common
import faults
import test_llm_faults as llm_faults
import tiny_decoders

BACKENDS = ("shm", "gloo")
TIMEOUT = 2.0
CASES: dict[str, tuple[Callable[..., Any], Callable[[], None]]] = {
    "exception, others wait in all_reduce": (faults.in_collective, faults.fail),
    "SIGKILL, others wait in all_reduce": (faults.in_collective, faults.kill),
    "SIGKILL in a ring step": (faults.in_ring_step, faults.kill),
    "SIGKILL while loading": (faults.in_load, faults.kill),
    "exit code 3, others wait": (faults.in_collective, faults.leave),
    f"SIGSTOP, timeout {TIMEOUT:g} s": (faults.in_collective, faults.stop),
    f"endless loop, timeout {TIMEOUT:g} s": (faults.in_collective, faults.spin),
}

PEERS = {  # one rank raises while the other waits; prints the clock just before
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "mp.spawn": [],
    "multicard run": ["-m", "multicard", "run", "--tp", "2"],
}
PEER_SCRIPT = """
import os, sys, time, torch, torch.distributed as dist, torch.multiprocessing as mp

def work(rank, port=None):
    if port:
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo")
    dist.barrier()
    if rank == 1:
        open(sys.argv[1], "w").write(str(time.monotonic()))
        raise LookupError("not in the index")
    dist.all_reduce(torch.ones(4))

if __name__ == "__main__":
    if "RANK" in os.environ:
        work(int(os.environ["RANK"]))
    else:
        mp.spawn(work, ("29517",), 2)
"""


def hurt(mesh: mc.ParallelMesh, moment: Callable[..., Any], victim: int, fault: Callable[[], None], clock: str) -> None:
    def timed() -> None:
        pathlib.Path(clock).write_text(str(time.monotonic()))
        fault()

    moment(mesh, victim, timed)


def measure(ranks: mc.Ranks, moment: Callable[..., Any], victim: int, fault: Callable[[], None]) -> tuple[float, float]:
    """Seconds from the fault to the caller's error, and until every process is gone."""
    with tempfile.NamedTemporaryFile("r") as clock:
        pids = ranks.pids
        try:
            ranks.run(hurt, moment, victim, fault, clock.name)
        except (mc.errors.RankError, LookupError):
            told = time.monotonic()
        assert faults.gone(pids), "a process is left"
        gone = time.monotonic()
        happened = float(clock.read())
    return told - happened, gone - happened


def measure_faults(backend: str, size: int, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for name, (moment, fault) in CASES.items():
        degrees = {"ring": size} if moment is faults.in_ring_step else {"tp": size}
        with mc.Ranks(mc.ParallelConfig(**degrees), backend=backend, timeout=TIMEOUT, threads_per_rank=1) as ranks:
            times = []
            for i in range(rounds):
                if i:
                    ranks.restart()
                times.append(measure(ranks, moment, i % size, fault))
        told, gone = zip(*times, strict=True)
        rows.append(described(name, backend, size, told, gone))
    return rows


def measure_llm(backend: str, size: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds from a rank's SIGKILL within a request, or while loading, to the caller's error."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        clock = pathlib.Path(folder, "clock")

        def fault() -> None:
            clock.write_text(str(time.monotonic()))
            faults.kill()

        path, _ = tiny_decoders.write(pathlib.Path(folder), llm_faults.NAME)
        with mc.LLM(path, ring=size, backend=backend, threads_per_rank=1) as model:
            for moment in [each for each in llm_faults.MOMENTS if each != "idle"]:
                times = []
                for i in range(rounds):
                    model.generate(llm_faults.PROMPT, max_new_tokens=2)  # starts them again
                    try:
                        llm_faults.hurt(model, i % size, moment, fault)
                    except mc.errors.RankError:
                        end = time.monotonic()
                    assert faults.gone(model._ranks.pids), "a process is left"
                    happened = float(clock.read_text())
                    times.append((end - happened, time.monotonic() - happened))
                told, gone = zip(*times, strict=True)
                rows.append(described(f"LLM: SIGKILL in {moment}", backend, size, told, gone))
    return rows


def described(fault: str, backend: str, size: int, told: Sequence[float], gone: Sequence[float]) -> dict[str, Any]:
    return {
        "fault": fault,
        "backend": backend,
        "ranks": size,
        "error (s), median": statistics.median(told),
        "max": max(told),
        "all gone (s), max": max(gone),
    }


def measure_check(rounds: int) -> list[dict[str, Any]]:
    """Median microseconds of an all-reduce of 16 KB, with and without the check."""

    def reduce(mesh: mc.ParallelMesh) -> float:
        x, times = torch.zeros(4096), []
        for _ in range(300):
            start = time.perf_counter()
            collectives.all_reduce(x, mesh.tp)
            times.append(time.perf_counter() - start)
        return statistics.median(times) * 1e6

    rows = []
    for backend in BACKENDS:
        two = mc.ParallelConfig(tp=2)
        with (
            mc.Ranks(two, backend=backend, threads_per_rank=1) as plain,
            mc.Ranks(two, backend=backend, threads_per_rank=1, check=True) as checked,
        ):
            times = [(plain.run(reduce)[0], checked.run(reduce)[0]) for _ in range(rounds)]
        without, with_check = (statistics.median(each) for each in zip(*times, strict=True))
        rows.append({"backend": backend, "plain (us)": without, "checked (us)": with_check, "x": with_check / without})
    return rows


def measure_peers(rounds: int) -> list[dict[str, Any]]:
    """Seconds from a rank's exception to the launcher's end, on gloo, alternating."""
    times: dict[str, list[float]] = {name: [] for name in PEERS}
    with tempfile.TemporaryDirectory() as folder:
        script, clock = pathlib.Path(folder, "peer.py"), pathlib.Path(folder, "clock")
        script.write_text(PEER_SCRIPT)
        for _ in range(rounds):
            for name, launcher in PEERS.items():
                subprocess.run([sys.executable, *launcher, str(script), str(clock)], capture_output=True, timeout=100)
                times[name].append(time.monotonic() - float(clock.read_text()))
    return [{"launcher": name, "exception to end (s), median": statistics.median(each)} for name, each in times.items()]


PARTS: dict[str, Callable[[int, int], list[dict[str, Any]]]] = {
    "faults": lambda ranks, rounds: [row for each in BACKENDS for row in measure_faults(each, ranks, rounds)],
    "llm": lambda ranks, rounds: [row for each in BACKENDS for row in measure_llm(each, ranks, rounds)],
    "check": lambda ranks, rounds: measure_check(rounds),
    "peers": lambda ranks, rounds: measure_peers(rounds),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which tables; default: all")
    options = parser.parse_args()
    tables = {part: PARTS[part](options.ranks, options.rounds) for part in options.parts}
    if options.json:
        common.report([], True, **tables)
        return
    print(*(f"{key}: {value}" for key, value in common.machine().items()), sep=", ")
    for rows in tables.values():
        common.print_table(rows)
        print()


if __name__ == "__main__":
    main()
