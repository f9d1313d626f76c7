"""shm against gloo, and against MPICH where mpi4py is installed, alternating in one run.

    python benchmarks/collectives.py                      # shm and gloo
    mpiexec -n 2 python benchmarks/collectives.py         # and MPICH
    python benchmarks/collectives.py --ranks 4 --json

Each figure is the median over rounds of the mean microseconds of back-to-back calls. "direct" is what multicard's own
layers call, "shm" the same through torch.distributed. "bound" is one copy of the bytes that a rank receives, at the
speed at which all ranks copy at once.
"""

from __future__ import annotations

import argparse
import datetime
import os
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import multicard.backends.shm  # noqa: F401  registers itself
from common import alternate, report
from multicard import collectives
from multicard.axis import Axis

SIZES = [256, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20]
OPS = ("all_reduce", "all_gather", "all_to_all", "ring")
Call = Callable[[], object]


def torch_calls(group: dist.ProcessGroup, x: torch.Tensor, out: torch.Tensor) -> dict[str, Call]:
    """Through torch.distributed, on ``x`` bytes from each rank."""
    size, rank = group.size(), group.rank()
    ranks = dist.get_process_group_ranks(group)
    after, before = ranks[(rank + 1) % size], ranks[(rank - 1) % size]

    def ring() -> None:
        sends, receives = (
            dist.P2POp(dist.isend, x, after, group),
            dist.P2POp(dist.irecv, out[: x.numel()], before, group),
        )
        for work in dist.batch_isend_irecv([sends, receives]):
            work.wait()

    return {
        "all_reduce": lambda: dist.all_reduce(x, group=group),
        "all_gather": lambda: dist.all_gather_single(out, x, group=group),
        "all_to_all": lambda: dist.all_to_all_single(out[: x.numel()], x, group=group),
        "ring": ring,
    }


def direct_calls(group: dist.ProcessGroup, x: torch.Tensor) -> dict[str, Call]:
    """As multicard's layers call it."""
    axis = Axis("benchmark", group.rank(), group.size(), group)
    shift = collectives.RingShift(axis)

    def ring() -> None:
        shift.start([x])
        shift.wait()

    return {
        "all_reduce": lambda: collectives.all_reduce(x, axis),
        "all_gather": lambda: collectives.all_gather(x, axis),
        "all_to_all": lambda: collectives.all_to_all(x, axis),
        "ring": ring,
    }


def mpi_calls(comm, x: torch.Tensor, out: torch.Tensor) -> dict[str, Call]:
    from mpi4py import MPI

    sent, received = x.numpy(), out.numpy()
    rank, size = comm.Get_rank(), comm.Get_size()
    after, before = (rank + 1) % size, (rank - 1) % size
    return {
        "all_reduce": lambda: comm.Allreduce(MPI.IN_PLACE, sent),
        "all_gather": lambda: comm.Allgather(sent, received),
        "all_to_all": lambda: comm.Alltoall(sent, received[: len(sent)]),
        "ring": lambda: comm.Sendrecv(sent, after, recvbuf=received[: len(sent)], source=before),
    }


def measure(shm: dist.ProcessGroup, gloo: dist.ProcessGroup, comm, sizes: list[int], rounds: int) -> list[dict]:
    rows = []
    for nbytes in sizes:
        x = torch.zeros(nbytes // 4)
        out = torch.zeros(nbytes // 4 * shm.size())
        copy = torch.zeros_like(x)
        calls = max(1, min(200, (4 << 20) // nbytes))
        by_name = {"direct": direct_calls(shm, x), "shm": torch_calls(shm, x, out), "gloo": torch_calls(gloo, x, out)}
        if comm is not None:
            by_name["mpich"] = mpi_calls(comm, x, out)
        for op in OPS:
            shm.barrier()
            contestants = {name: calls_of[op] for name, calls_of in by_name.items()}
            contestants["bound"] = lambda copy=copy, x=x: copy.copy_(x)
            times = {name: seconds * 1e6 for name, seconds in alternate(contestants, rounds, calls).items()}
            row = {"op": op, "bytes": nbytes, **times, "gloo/shm": times["gloo"] / times["shm"]}
            if comm is not None:
                row["shm/mpich"] = times["shm"] / times["mpich"]
                row["direct/mpich"] = times["direct"] / times["mpich"]
            rows.append(row)
    return rows


def run(rank: int, options: argparse.Namespace, path: str, comm=None) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "cpu:shm",
        init_method=f"file://{path}/store",
        rank=rank,
        world_size=options.ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    gloo = dist.new_group(backend="gloo")
    rows = measure(dist.group.WORLD, gloo, comm, options.sizes, options.rounds)
    if rank == 0:
        report(rows, options.json, ranks=options.ranks, unit="microseconds")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="bytes a rank")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if "PMI_RANK" in os.environ:  # started by mpiexec
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
        options.ranks = comm.Get_size()
        with tempfile.TemporaryDirectory() as mine:
            run(comm.Get_rank(), options, comm.bcast(mine), comm)
            comm.Barrier()
        return
    with tempfile.TemporaryDirectory() as path:
        mp.spawn(run, (options, path), nprocs=options.ranks)


if __name__ == "__main__":
    main()
