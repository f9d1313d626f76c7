"""Ranks that die, stop, raise or are interrupted inside shm's collectives: the others are told who, and soon."""

import contextlib
import datetime
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
import torch.distributed as dist

from multicard.backends.shm.segment import Handshake
from multicard.errors import CollectiveTimeout, RankError

RANKS = 4
COLLECTIVES = ("all_reduce", "all_reduce large", "all_gather", "reduce_scatter", "broadcast", "reduce", "gather",
               "scatter", "all_to_all", "barrier", "ring", "ring large")  # fmt: skip


def call(name: str, rank: int, size: int) -> None:
    """One collective of that name."""
    name, _, large = name.partition(" ")
    n = 1 << 21 if large else 512
    x, root = torch.ones(n), 1
    parts = [torch.empty(n) for _ in range(size)]
    if name == "ring":
        sends, receives = dist.isend(x, (rank + 1) % size), dist.irecv(torch.empty(n), (rank - 1) % size)
        sends.wait()
        receives.wait()
    elif name == "barrier":
        dist.barrier()
    elif name in ("all_reduce", "broadcast", "reduce"):
        getattr(dist, name)(x, *([root] if name != "all_reduce" else []))
    elif name == "all_gather":
        dist.all_gather(parts, x)
    elif name == "reduce_scatter":
        dist.reduce_scatter(x, parts)
    elif name == "gather":
        dist.gather(x, parts if rank == root else None, root)
    elif name == "scatter":
        dist.scatter(x, parts if rank == root else None, root)
    else:
        dist.all_to_all(parts, [x] * size)


def rank_main(rank: int, size: int, path: str, timeout: float, names: list[str], pipe) -> None:
    """Make calls without end; say what ended them."""
    import multicard.backends.shm  # noqa: F401  registers itself

    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("cpu:shm", init_method=f"file://{path}/store", rank=rank, world_size=size, timeout=limit)
    dist.barrier()
    dist.group.WORLD.set_timeout(datetime.timedelta(seconds=timeout))
    pipe.send("ready")
    try:
        while True:
            for name in names:
                call(name, rank, size)
    except RankError as error:
        pipe.send((type(error), error.rank, error.collective, str(error), time.monotonic()))
    except KeyboardInterrupt:
        pipe.send("interrupted")
    time.sleep(60)  # alive, but out of the group: what a rank does that handles its error


@pytest.fixture(scope="module")
def start():
    """``start(directory, names, timeout)``: ranks forked from a server that has imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "multicard.backends.shm", __name__])
    started = []

    def go(directory, names, timeout=60.0, size=RANKS):
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (rank, size, str(directory), timeout, names, theirs)
            processes.append(context.Process(target=rank_main, args=arguments, daemon=True))
            processes[-1].start()
            pipes.append(ours)
        started.extend(processes)
        assert [receive(pipe) for pipe in pipes] == ["ready"] * size
        return processes, pipes

    yield go
    for process in started:
        process.kill()
    for process in started:
        process.join()


def receive(pipe):
    assert pipe.poll(30), "a rank said nothing for 30 s"
    return pipe.recv()


def end(processes) -> None:
    for process in processes:
        process.kill()


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_killed_rank_is_named_by_all_the_others(start, tmp_path, name):
    victim = random.Random(name).randrange(RANKS)
    processes, pipes = start(tmp_path, [name])
    time.sleep(random.Random(name).uniform(0.01, 0.05))
    os.kill(processes[victim].pid, signal.SIGKILL)
    told = [receive(pipe) for rank, pipe in enumerate(pipes) if rank != victim]
    end(processes)
    for kind, culprit, collective, message, _ in told:
        assert (kind, culprit) == (RankError, victim)  # and not CollectiveTimeout: its limit is a minute
        assert collective in (("send", "recv") if name.startswith("ring") else name.split()), message
        assert f"rank {victim}" in message


@pytest.mark.parametrize("name", ["all_reduce", "broadcast", "all_to_all", "ring large"])
def test_a_stopped_rank_is_named_at_the_timeout(start, tmp_path, name):
    victim = 2
    processes, pipes = start(tmp_path, [name], timeout=0.5)
    os.kill(processes[victim].pid, signal.SIGSTOP)
    told = [receive(pipe) for rank, pipe in enumerate(pipes) if rank != victim]
    end(processes)
    assert {culprit for _, culprit, *_ in told} == {victim}, told
    assert all(issubclass(kind, CollectiveTimeout) for kind, *_ in told)
    assert any("did not arrive within 0.5 s" in message for *_, message, _ in told)


def test_an_interrupted_rank_stops_at_once_and_the_others_are_told(start, tmp_path):
    processes, pipes = start(tmp_path, ["all_reduce"])
    os.kill(processes[3].pid, signal.SIGSTOP)  # the others now wait for it
    time.sleep(0.3)
    os.kill(processes[1].pid, signal.SIGINT)
    assert receive(pipes[1]) == "interrupted"
    os.kill(processes[3].pid, signal.SIGCONT)
    told = {rank: receive(pipes[rank]) for rank in (0, 2, 3)}
    end(processes)
    for kind, culprit, collective, message, _ in told.values():
        assert (kind, culprit, collective) == (RankError, 1, "all_reduce"), message


def leave(rank: int, size: int, path: str, pipe) -> None:
    import multicard.backends.shm  # noqa: F401  registers itself

    limit = datetime.timedelta(seconds=60)
    for again in range(2):  # a second life over the same store
        dist.init_process_group(
            "cpu:shm", init_method=f"file://{path}/store", rank=rank, world_size=size, timeout=limit
        )
        x = torch.full((3,), float(rank + again))
        dist.all_reduce(x)
        if again == 0:
            dist.barrier()
            dist.destroy_process_group()
    said = x.tolist()
    if rank == 1:
        dist.group.WORLD.shutdown()
    with contextlib.suppress(Exception):
        pipe.send((said, None))
    try:
        dist.all_reduce(x)
    except RankError as error:
        pipe.send((said, (error.rank, str(error))))
    time.sleep(60)


def test_a_rank_that_leaves_is_named_and_groups_can_be_made_again(tmp_path):
    context = multiprocessing.get_context("forkserver")
    pipes, processes = [], []
    for rank in range(2):
        ours, theirs = context.Pipe(duplex=False)
        processes.append(context.Process(target=leave, args=(rank, 2, str(tmp_path), theirs), daemon=True))
        processes[-1].start()
        pipes.append(ours)
    try:
        assert [receive(pipe) for pipe in pipes] == [([3.0] * 3, None)] * 2
        told = [receive(pipe)[1] for pipe in pipes]
    finally:
        end(processes)
    assert told[0][0] == 1
    assert "left the group" in told[0][1]
    assert "shut down" in told[1][1]


@pytest.mark.parametrize("left", ["", "0f2c", "0f2c/pid 7 8 ", "\0\0\0\0"])
def test_a_rank_without_a_whole_handshake_is_named(left):
    store = dist.HashStore()
    store.set("1", left)
    handshake = Handshake(store, 0, (4, 6))
    with pytest.raises(RankError, match="rank 6 is gone") as caught:
        handshake.complete(timeout=20)
    assert caught.value.rank == 6
    assert repr(left.encode()) in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_memory_of_another_user_is_refused():
    store = dist.HashStore()
    invited, reader = (Handshake(store, rank, (4, 6)) for rank in range(2))
    os.fchown(invited.fd, 65534, 65534)
    with pytest.raises(RankError, match=r"the store was tampered with: .*rank 4's memory .* belongs to user 65534"):
        reader.complete(timeout=20)
