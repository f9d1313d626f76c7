"""Ranks as threads of this process: as many as one likes, for cells by the hundred. Real ranks are in test_cells.py.

Replaces the three collectives that attention uses. Each checks what real ones can't: that the sizes which a rank worked
out for the others are those that the others really send.
"""

import contextlib
import itertools
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch

import multicard as mc
from multicard import collectives

PATIENCE = 20  # seconds until a rank that waits for another gives up


class Meeting:
    """Stands in for a process group: where the ranks of one axis hand things to each other."""

    def __init__(self, size: int) -> None:
        self.board = [None] * size
        self.barrier = threading.Barrier(size)
        self.mail = [queue.Queue() for _ in range(size)]

    def exchange(self, rank, value):
        self.board[rank] = value
        self.barrier.wait(PATIENCE)
        values = list(self.board)
        self.barrier.wait(PATIENCE)
        return values


def all_gather(x, axis, dim=0, sizes=None):
    if axis.size == 1:
        return x
    parts = axis.group.exchange(axis.rank, x)
    expected = [x.shape[dim]] * axis.size if sizes is None else list(sizes)
    assert [part.shape[dim] for part in parts] == expected
    return torch.cat(parts, dim)


def all_to_all(x, axis, send_sizes=None, receive_sizes=None):
    parts = [sent[axis.rank] for sent in axis.group.exchange(axis.rank, x.split(send_sizes))]
    assert [len(part) for part in parts] == list(receive_sizes)
    return torch.cat(parts)


class RingShift:
    def __init__(self, axis):
        self.axis = axis

    def start(self, tensors, shapes=None):
        self.shapes = [tuple(t.shape) for t in tensors] if shapes is None else [tuple(shape) for shape in shapes]
        self.axis.group.mail[(self.axis.rank + 1) % self.axis.size].put([t.clone() for t in tensors])

    def wait(self):
        received = self.axis.group.mail[self.axis.rank].get(timeout=PATIENCE)
        assert [tuple(t.shape) for t in received] == self.shapes
        return received


def meshes(config: mc.ParallelConfig) -> list[mc.ParallelMesh]:
    """The mesh as each rank of ring x Ulysses sees it."""
    groups: dict = {}

    def axis(name, rank, size, *others):
        return mc.Axis(name, rank, size, groups.setdefault((name, *others), Meeting(size)) if size > 1 else None)

    one = {name: mc.Axis(name, 0, 1) for name in ("dp", "cfg", "tp")}
    return [
        mc.ParallelMesh(
            config=config,
            rank=rank,
            device=torch.device("cpu"),
            ring=axis("ring", r, config.ring, u),
            ulysses=axis("ulysses", u, config.ulysses, r),
            sequence=axis("sequence", rank, config.world_size),
            replica=axis("replica", rank, config.world_size),
            world=axis("world", rank, config.world_size),
            **one,
        )
        for rank, (r, u) in enumerate(itertools.product(range(config.ring), range(config.ulysses)))
    ]


@contextlib.contextmanager
def thread_collectives():
    with mock.patch.multiple(collectives, all_gather=all_gather, all_to_all=all_to_all, RingShift=RingShift):
        yield


def run_threads(fn, *args, **degrees):
    """``fn(mesh, *args)`` on every rank of that mesh, values by rank."""
    ranks = meshes(mc.ParallelConfig(**degrees))
    with thread_collectives(), ThreadPoolExecutor(len(ranks)) as pool:
        return [future.result() for future in [pool.submit(fn, mesh, *args) for mesh in ranks]]
