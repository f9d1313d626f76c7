"""How long after a rank's fault its caller has the error, and nothing is left; and what the check costs.

    python benchmarks/faults.py [--json] [--rounds 5] [--peers]

There is no bound but the launcher's own graces: none for an exception with nobody waiting, 0.5 s where the other ranks
are still in the call, 0.3 s after a death, and the collective's timeout (2 s here) for a hang.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

import multicard as mc
from multicard import collectives

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))

import common
import faults

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
        rows.append(
            {
                "fault": name,
                "backend": backend,
                "ranks": size,
                "error (s), median": statistics.median(told),
                "max": max(told),
                "all gone (s), max": max(gone),
            }
        )
    return rows


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
    for backend in ("shm", "gloo"):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--peers", action="store_true", help="torchrun and mp.spawn too")
    options = parser.parse_args()
    rows = [row for backend in ("shm", "gloo") for row in measure_faults(backend, options.ranks, options.rounds)]
    check = measure_check(options.rounds)
    peers = measure_peers(options.rounds) if options.peers else []
    if options.json:
        common.report(rows, True, check=check, peers=peers)
        return
    common.report(rows, False)
    print()
    common.print_table(check)
    print()
    common.print_table(peers)


if __name__ == "__main__":
    main()
