"""However a job ends, by its parent's death, Ctrl-C, or a hundred failures in a row, nothing of it is left."""

import gc
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest
import torch

import faults
import multicard as mc
from multicard import collectives

PARENT = """
import concurrent.futures, json, sys, threading, time, torch
import multicard as mc
from multicard import collectives

def wait_in_collective(mesh):
    if mesh.rank:
        collectives.all_reduce(torch.ones(4), mesh.world)
    time.sleep(60)

def load(mesh):
    time.sleep(60)

def main():
    ranks = mc.Ranks(mc.ParallelConfig(tp=2), backend="{backend}")
    print(json.dumps(ranks.pids), flush=True)
    if "{moment}" == "idle":
        time.sleep(60)
    else:
        ranks.run(dict(collective=wait_in_collective, load=load)["{moment}"])

if "{thread}" == "main":
    main()
elif "{thread}" == "pool":
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pool.submit(main).result()
else:
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
"""


def start_parent(backend: str, moment: str, thread: str = "main") -> tuple[subprocess.Popen, list[int]]:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            PARENT.replace("{backend}", backend).replace("{moment}", moment).replace("{thread}", thread),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    pids = json.loads(parent.stdout.readline())
    time.sleep(0.3)  # until the ranks are in the middle of it
    return parent, pids


@pytest.mark.parametrize(
    ("backend", "moment", "thread"),
    [("shm", "collective", "other"), ("gloo", "collective", "main"), ("shm", "load", "main")],
)
def test_ranks_end_with_their_parent(backend, moment, thread):
    parent, pids = start_parent(backend, moment, thread)
    os.kill(pids[0], signal.SIGSTOP)  # not even this keeps one
    parent.kill()
    parent.communicate()
    assert faults.gone(pids)


@pytest.mark.parametrize(
    ("backend", "moment", "number", "thread"),
    [
        ("shm", "collective", signal.SIGINT, "main"),
        ("gloo", "idle", signal.SIGINT, "main"),
        ("shm", "load", signal.SIGINT, "other"),
        ("gloo", "collective", signal.SIGINT, "pool"),
        ("gloo", "load", signal.SIGTERM, "main"),
    ],
)
def test_interrupts_end_everything(backend, moment, number, thread):
    parent, pids = start_parent(backend, moment, thread)
    parent.send_signal(number)
    _, stderr = parent.communicate(timeout=30)
    assert parent.returncode != 0
    assert ("KeyboardInterrupt" in stderr) == (number == signal.SIGINT)
    assert faults.gone(pids)


def test_an_interrupted_call_ends_the_ranks_and_says_so():
    with mc.Ranks(mc.ParallelConfig(tp=2)) as ranks:
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            ranks.run(lambda mesh: time.sleep(60))
        assert faults.gone(ranks.pids)
        with pytest.raises(mc.errors.RankError, match="KeyboardInterrupt"):
            ranks.run(lambda mesh: None)


def test_ranks_end_with_what_they_started(tmp_path):
    def start_child(mesh):
        return subprocess.Popen(["sleep", "60"]).pid

    with mc.Ranks(mc.ParallelConfig(tp=2)) as ranks:
        children = ranks.run(start_child)
    assert faults.gone(children)


def test_forgotten_ranks_end():
    ranks = mc.Ranks(mc.ParallelConfig(tp=2))
    pids = ranks.pids
    del ranks
    gc.collect()
    assert faults.gone(pids)


SURROUNDINGS = """
import os, sys
import multicard as mc
from multicard import collectives
import torch

os.mkdir("gone")
os.chdir("gone")
os.rmdir("../gone")
many = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]

def work(mesh):
    print("hello")
    return collectives.all_reduce(torch.ones(1), mesh.tp).item()

with open(sys.argv[1], "w") as found:
    found.write(str(mc.launch(work, mc.ParallelConfig(tp=2), backend="gloo")))
"""


def test_poor_surroundings(tmp_path):
    """No standard input, output or error, no home, a folder that was deleted, descriptors beyond select's."""
    command = 'ulimit -n 2000; unset HOME; exec "$0" -c "$1" "$2" <&- >&- 2>&-'
    found = tmp_path / "found"
    subprocess.run(["bash", "-c", command, sys.executable, SURROUNDINGS, found], cwd=tmp_path, timeout=120)
    assert found.read_text() == "[2.0, 2.0]"


def test_ranks_that_cannot_be_started_are_an_error(monkeypatch):
    mc.launch(lambda mesh: None, mc.ParallelConfig(tp=2))  # the fork server stays
    before = footprint()

    def refuse(*args):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    with pytest.raises(mc.errors.RankError, match=r"rank 0 can't be started: .*Too many open files"):
        mc.Ranks(mc.ParallelConfig(tp=2))
    assert footprint() == before


# ---- nothing grows


def cycle(backend: str) -> torch.Tensor:
    def work(mesh):
        x = torch.linspace(0, 1, 1000) * (mesh.rank + 1)
        return collectives.all_reduce(x, mesh.world)

    with mc.Ranks(mc.ParallelConfig(tp=2), backend=backend, timeout=10) as ranks:
        value = ranks.run(work)[0]
        with pytest.raises(LookupError):
            ranks.run(faults.in_collective, 1, faults.fail)
    return value


def footprint() -> tuple[int, int, int]:
    gc.collect()
    me = psutil.Process()
    return me.num_fds(), me.num_threads(), len(me.children(recursive=True))


def check_cycles(times: int, backends: list[str]) -> None:
    first = cycle(backends[0])
    before = footprint()
    for i in range(times):
        assert torch.equal(cycle(backends[i % len(backends)]), first)
    assert footprint() == before


def test_failures_leave_nothing_behind():
    check_cycles(1, ["shm"])


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_two_hundred_failures_leave_nothing_behind():
    check_cycles(200, ["shm", "gloo"])


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_fifty_launches_at_once():
    results = {}

    def start(i):
        results[i] = mc.launch(lambda mesh: mesh.rank, mc.ParallelConfig(tp=2), threads_per_rank=1)

    threads = [threading.Thread(target=start, args=(i,)) for i in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [0, 1] for i in range(50)}


# ---- what listens


@pytest.fixture(scope="module", params=["shm", "gloo"])
def pair(request):
    with mc.Ranks(mc.ParallelConfig(tp=2), backend=request.param, timeout=20) as ranks:
        yield ranks


def test_only_gloo_listens_and_on_loopback_alone(pair, request):
    assert pair.run(lambda mesh: collectives.all_reduce(torch.ones(2), mesh.tp).tolist()) == [[2.0, 2.0]] * 2
    gloo = request.node.callspec.params["pair"] == "gloo"
    assert {ip for ip, _ in faults.listeners(pair.pids)} == ({"127.0.0.1"} if gloo else set())
    assert not faults.listeners([os.getpid()])


LISTENERS = """
import os, socket, psutil, torch
import multicard as mc
from multicard import collectives

mesh = mc.init_mesh()
collectives.all_reduce(torch.ones(1), mesh.tp)
caller = psutil.Process().parents()[1]  # the parent is the fork server
job = [caller, *caller.children(recursive=True)]
listening = [each.laddr.ip for process in job for each in process.net_connections("inet") if each.status == "LISTEN"]
print(socket.gethostbyname(socket.gethostname()), sorted(set(listening)))
"""
ELSEWHERE = (
    'hostname elsewhere && cp /etc/hosts $0 && echo 10.9.9.9 elsewhere >> $0 && mount --bind $0 /etc/hosts && "$@"'
)


def test_a_host_name_that_resolves_elsewhere_changes_nothing(tmp_path):
    inside = ["unshare", "--uts", "--mount", "bash", "-c", ELSEWHERE, str(tmp_path / "hosts")]
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("needs root for a host name of its own")
    (tmp_path / "script.py").write_text(LISTENERS)
    run = [sys.executable, "-m", "multicard", "run", "--tp", "2", "--backend", "gloo", str(tmp_path / "script.py")]
    done = subprocess.run([*inside, *run], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[0] 10.9.9.9 ['127.0.0.1']\n", done.stderr


def test_strangers_at_the_ports_change_nothing(pair):
    def work(mesh):
        return collectives.all_reduce(torch.arange(5.0) + mesh.rank, mesh.tp)

    expected = pair.run(work)
    sockets, noise = [], random.Random(0)
    for ip, port in faults.listeners([os.getpid(), *pair.pids]):
        for i in range(6):
            stranger = socket.create_connection((ip, port), timeout=5)
            sockets.append(stranger)
            if i % 2:  # the others stay half open
                stranger.sendall(noise.randbytes(64 * i))
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(pair.run(work), expected, strict=True))
    for stranger in sockets:
        stranger.close()
    assert all(torch.equal(a, b) for a, b in zip(pair.run(work), expected, strict=True))


def test_no_pickle_comes_from_a_socket_and_nothing_is_torch_loaded():
    code = textwrap.dedent(
        """
        import sys
        import multicard as mc, torch, torch.distributed as dist

        def refuse(*args, **kwargs):
            raise AssertionError("unpickled from a socket, or torch.load")

        def work(mesh):
            torch.load = dist.all_gather_object = dist.broadcast_object_list = refuse
            return torch.ones(3), mc.init_mesh(mc.ParallelConfig(ring=2)).ring.rank

        torch.load = refuse
        assert [rank for _, rank in mc.launch(work, mc.ParallelConfig(tp=2))] == [0, 1]
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
