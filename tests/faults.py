"""What can happen to a rank, and when: shared by the tests of faults."""

import ctypes
import os
import signal
import sys
import time

import psutil
import torch

from multicard import collectives

WARM_UP = 3  # collectives that go well first, so that the one that fails has number WARM_UP + 2: joining has a barrier


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def crash():
    ctypes.string_at(0)


def leave():
    sys.stderr.write("leaving")  # and no newline
    sys.stderr.flush()
    os._exit(3)


def fail():
    raise LookupError("not in the index")


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def spin():
    while True:
        pass


def in_collective(mesh, victim, fault):
    """The victim's fault happens instead of its next all-reduce, in which the others wait."""
    for _ in range(WARM_UP):
        collectives.all_reduce(torch.ones(64), mesh.world)
    if mesh.rank == victim:
        fault()
    collectives.all_reduce(torch.ones(64), mesh.world)


def left_early(mesh, victim):
    """The victim returns where the others wait for it."""
    for _ in range(WARM_UP):
        collectives.all_reduce(torch.ones(64), mesh.world)
    if mesh.rank != victim:
        collectives.all_reduce(torch.ones(64), mesh.world)


def in_ring_step(mesh, victim, fault):
    """Instead of its turn to pass on keys and values."""
    shift = collectives.RingShift(mesh.ring)
    for step in range(WARM_UP):
        if mesh.rank == victim and step == WARM_UP - 1:
            fault()
        shift.start([torch.ones(1 << 16)])
        shift.wait()


def in_load(mesh, victim, fault):
    """While every rank is busy by itself."""
    time.sleep(0.1 if mesh.rank == victim else 60)
    fault()


def gone(pids, patience=20.0):
    """Whether none of the processes is left, a moment after."""
    deadline = time.monotonic() + patience
    while (left := [pid for pid in pids if os.path.exists(f"/proc/{pid}")]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not left


def listeners(pids):
    """Addresses and ports on which the processes wait for connections."""
    found = [each for pid in pids for each in psutil.Process(pid).net_connections("inet")]
    return [(each.laddr.ip, each.laddr.port) for each in found if each.status == psutil.CONN_LISTEN]
