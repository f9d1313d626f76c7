"""How long after a rank's fault its caller has the error, and nothing is left; and what the check costs.

    python benchmarks/faults.py [--json] [--rounds 5] [--parts faults llm check peers]

What to expect (multicard/ranks/patience.py): an exception is raised at once where another rank waits in a collective
for the one that raised, and after 0.5 s where the others are still computing; a hang 0.5 s after the collective's
timeout, which is 2 s here.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

import common
import multicard as mc
from multicard import collectives

BACKENDS = ("shm", "gloo")
TIMEOUT = 2.0
Moment = Callable[[mc.ParallelMesh, int, Callable[[], None]], None]


def in_all_reduce(mesh: mc.ParallelMesh, victim: int, fault: Callable[[], None]) -> None:
    collectives.all_reduce(torch.ones(64), mesh.world)
    if mesh.rank == victim:
        fault()
    collectives.all_reduce(torch.ones(64), mesh.world)


def in_ring_step(mesh: mc.ParallelMesh, victim: int, fault: Callable[[], None]) -> None:
    shift = collectives.RingShift(mesh.world)
    shift.start([torch.ones(1 << 16)])
    if mesh.rank == victim:
        fault()
    shift.wait()


def while_busy(mesh: mc.ParallelMesh, victim: int, fault: Callable[[], None]) -> None:
    time.sleep(0.1 if mesh.rank == victim else 60)
    fault()


def fail() -> None:
    raise LookupError("not in the index")


def spin() -> None:
    while True:
        pass


CASES: dict[str, tuple[Moment, Callable[[], None]]] = {
    "exception, others wait in all_reduce": (in_all_reduce, fail),
    "SIGKILL, others wait in all_reduce": (in_all_reduce, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "SIGKILL in a ring step": (in_ring_step, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "SIGKILL while others are busy": (while_busy, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "exit code 3, others wait": (in_all_reduce, lambda: os._exit(3)),
    f"SIGSTOP, timeout {TIMEOUT:g} s": (in_all_reduce, lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    f"endless loop, timeout {TIMEOUT:g} s": (in_all_reduce, spin),
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


def hurt(mesh: mc.ParallelMesh, moment: Moment, victim: int, fault: Callable[[], None], clock: str) -> None:
    def timed() -> None:
        pathlib.Path(clock).write_text(str(time.monotonic()))
        fault()

    moment(mesh, victim, timed)


def until_error(pids: list[int], call: Callable[..., Any], *args: Any) -> tuple[float, float]:
    """The moments of the caller's error, and when every process is gone."""
    try:
        call(*args)
    except (mc.errors.RankError, LookupError):
        raised = time.monotonic()
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < raised + 20, "a process is left"
        time.sleep(0.005)
    return raised, time.monotonic()


def measure_faults(backend: str, size: int, rounds: int) -> list[dict[str, Any]]:
    rows = []
    config = mc.ParallelConfig(tp=size)
    with (
        tempfile.NamedTemporaryFile("r") as clock,
        mc.Ranks(config, backend=backend, timeout=TIMEOUT, threads_per_rank=1) as ranks,
    ):
        for name, (moment, fault) in CASES.items():
            times = []
            for i in range(rounds):
                if not ranks.alive:
                    ranks.restart()
                ends = until_error(ranks.pids, ranks.run, hurt, moment, i % size, fault, clock.name)
                clock.seek(0)
                times.append((float(clock.read()), *ends))
            rows.append(described(name, backend, size, times))
    return rows


def measure_llm(backend: str, size: int, rounds: int) -> list[dict[str, Any]]:
    """A rank is killed from outside, somewhere in a request."""
    times = []
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    with tempfile.TemporaryDirectory() as folder:
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        with mc.LLM(folder, ring=size, backend=backend, threads_per_rank=1) as model:
            for i in range(rounds):
                model.generate([3, 1, 4], max_new_tokens=2)  # starts the ranks again
                killed: list[float] = []

                def kill(pid: int = model.pids[i % size], killed: list[float] = killed) -> None:
                    killed.append(time.monotonic())
                    os.kill(pid, signal.SIGKILL)

                threading.Timer(0.2, kill).start()
                ends = until_error(model.pids, lambda: model.generate([3, 1, 4], max_new_tokens=2000, ignore_eos=True))
                times.append((killed[0], *ends))
    return [described("LLM: SIGKILL in a request", backend, size, times)]


def described(fault: str, backend: str, size: int, times: list[tuple[float, float, float]]) -> dict[str, Any]:
    """A row of moments: the fault's, the error's, the last process's end."""
    errors = [error - happened for happened, error, _ in times]
    return {
        "fault": fault,
        "backend": backend,
        "ranks": size,
        "error (s), median": statistics.median(errors),
        "max": max(errors),
        "all gone (s), max": max(gone - happened for happened, _, gone in times),
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
