"""Where ranks come from: a fork server that has imported torch, which must never be told from a fresh start."""

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch

import faults
import multicard as mc
from multicard.ranks import starter

TWO = mc.ParallelConfig(tp=2)


def parent_of(mesh):
    return os.getppid()


def server_of(ranks: mc.Ranks) -> psutil.Process:
    (pid,) = set(ranks.run(parent_of))
    return psutil.Process(pid)


@pytest.fixture
def server():
    """The server of this test run, idle."""
    with mc.Ranks(TWO) as ranks:
        return server_of(ranks)


# ---- one server, and no trace of one job in the next


def test_jobs_are_forked_from_one_child_of_the_caller_that_runs_nothing(server):
    assert server.ppid() == os.getpid()
    assert set(mc.launch(parent_of, TWO)) == {server.pid}
    assert (server.num_threads(), server.children()) == (1, [])
    assert os.getpgid(server.pid) == server.pid  # Ctrl-C is the caller's alone


def test_threads_that_launch_at_once_share_it(server):
    found = {}

    def start(i):
        found[i] = mc.launch(lambda mesh: (i, mesh.rank, os.getppid()), TWO)

    threads = [threading.Thread(target=start, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: [(i, rank, server.pid) for rank in range(2)] for i in range(4)}


def test_a_job_leaves_nothing_for_the_next():
    def look(mesh):
        import numpy

        drawn = (torch.initial_seed(), random.random(), numpy.random.random())
        seen = (sys.modules.get("left"), os.environ.get("LEFT"), "left" in sys.path)
        torch.manual_seed(1)
        sys.modules["left"] = os
        os.environ["LEFT"] = "x"
        sys.path.append("left")
        return seen, drawn

    found = [each for _ in range(2) for each in mc.launch(look, TWO)]
    assert {seen for seen, _ in found} == {(None, None, False)}
    for generator in zip(*(drawn for _, drawn in found), strict=True):
        assert len(set(generator)) == 4


# ---- ranks are as their caller is now


@contextlib.contextmanager
def umask():
    before = os.umask(0o027)
    yield lambda mesh: os.umask(0), 0o027
    os.umask(before)


@contextlib.contextmanager
def variable():
    os.environ["MULTICARD_TEST_START"] = "now"
    yield lambda mesh: os.environ.get("MULTICARD_TEST_START"), "now"
    del os.environ["MULTICARD_TEST_START"]


@contextlib.contextmanager
def core():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield lambda mesh: os.sched_getaffinity(0), {min(before)}
    os.sched_setaffinity(0, before)


@contextlib.contextmanager
def limit():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
    yield lambda mesh: resource.getrlimit(resource.RLIMIT_NOFILE)[0], soft - 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def ignored_signal():
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    yield lambda mesh: signal.getsignal(signal.SIGUSR1), signal.SIG_IGN
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("change", [umask, variable, core, limit, ignored_signal])
def test_what_the_caller_has_changed_is_inherited(server, change):
    with change() as (look, expected):
        found = mc.launch(lambda mesh: (look(mesh), os.getppid()), mc.ParallelConfig())
    assert [value for value, _ in found] == [expected]
    assert server.pid not in {parent for _, parent in found}


def test_the_folder_is_the_callers_without_a_new_server(server, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend("")  # as in an interactive session; it names the folder
    sys.path.remove("")
    monkeypatch.chdir(tmp_path)
    assert mc.launch(lambda mesh: (os.getcwd(), os.getppid()), TWO) == [(str(tmp_path), server.pid)] * 2


# ---- where ranks can't be forked they are started fresh

UNFIT = {
    "it ends": "os._exit(1)",
    "it has threads": "import threading, time; threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()",
    "it has opened a device": "device = open('/dev/zero')",
}


@pytest.mark.parametrize("how", UNFIT)
def test_a_server_that_cannot_fork_is_done_without(how, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, sys\nif 'multicard.ranks.forkserver' in sys.orig_argv:\n    {UNFIT[how]}"
    )
    for _ in range(2):
        with mc.Ranks(TWO, env={"PYTHONPATH": f"{tmp_path}:{os.pathsep.join(sys.path)}"}) as ranks:
            assert ranks.run(parent_of) == [os.getpid()] * 2


@pytest.mark.parametrize("descriptors", [0, 5])
def test_a_server_without_descriptors_is_done_without(descriptors):
    with mc.Ranks(TWO, env={"MULTICARD_TEST_START": str(descriptors)}) as ranks:
        server = server_of(ranks)
        few = (3 + ranks.config.world_size + descriptors,) * 2  # standard ones, a status pipe of each rank
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, few)
        with mc.Ranks(TWO, env={"MULTICARD_TEST_START": str(descriptors)}) as others:
            assert os.getpid() in others.run(parent_of)
        assert ranks.run(parent_of) == [server.pid] * 2


def test_a_server_that_dies_while_it_forks_is_done_without(server, monkeypatch):
    ask = starter.ForkServer.ask

    def kill_and_ask(self, *request):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        ask(self, *request)

    monkeypatch.setattr(starter.ForkServer, "ask", kill_and_ask)
    assert mc.launch(parent_of, TWO) == [os.getpid()] * 2


# ---- its end


def test_a_server_killed_while_idle_is_replaced(server):
    server.kill()
    assert faults.gone([server.pid])
    assert server.pid not in mc.launch(parent_of, TWO)


def test_ranks_end_with_their_server_and_say_so(tmp_path):
    with mc.Ranks(TWO) as ranks:
        server, children = server_of(ranks), ranks.run(lambda mesh: subprocess.Popen(["sleep", "60"]).pid)
        threading.Timer(0.3, server.kill).start()
        with pytest.raises(mc.errors.RankError, match="SIGKILL") as caught:
            ranks.run(lambda mesh: time.sleep(60))
        assert f"process {server.pid}, which it was forked from, has ended" in caught.value.stderr
        assert faults.gone([server.pid, *ranks.pids, *children])
    assert mc.launch(lambda mesh: mesh.rank, TWO) == [0, 1]


def test_a_stopped_server_goes_on(server):
    server.suspend()
    assert mc.launch(parent_of, TWO) == [server.pid] * 2


CALLER = """
import os, sys, time, psutil
import multicard as mc

moment = sys.argv[1]
if moment == "importing":
    from multicard.cli import early
    early.prepare(tp=2)
elif moment == "idle":
    mc.launch(lambda mesh: None, mc.ParallelConfig(tp=2))
else:
    ranks = mc.Ranks(mc.ParallelConfig(tp=2))
    if moment == "stopped":
        psutil.Process().children()[0].suspend()
        for pid in ranks.pids:
            psutil.Process(pid).suspend()
print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
time.sleep(60)
"""
MOMENTS = {"importing": 1, "idle": 1, "running": 3, "stopped": 3}


@pytest.mark.parametrize("moment", MOMENTS)
def test_nothing_outlives_a_caller_that_is_killed(moment):
    with subprocess.Popen([sys.executable, "-c", CALLER, moment], stdout=subprocess.PIPE, text=True) as caller:
        pids = [int(pid) for pid in caller.stdout.readline().split()]
        caller.kill()
    assert len(pids) == MOMENTS[moment]
    assert faults.gone(pids)


FORKED_CALLER = """
import os
import multicard as mc

def parents():
    return set(mc.launch(lambda mesh: os.getppid(), mc.ParallelConfig(tp=2)))

before = parents()
if not (child := os.fork()):
    after = parents()
    os._exit(len(after) != 1 or after == before)
assert os.waitpid(child, 0)[1] == 0
assert parents() == before
"""


def test_a_process_forked_from_the_caller_has_a_server_of_its_own():
    done = subprocess.run([sys.executable, "-c", FORKED_CALLER], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


# ---- how a rank ended


@pytest.mark.parametrize(
    ("end", "text", "number"),
    [
        (lambda: os._exit(7), "exited with code 7", None),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), "killed by SIGTERM", signal.SIGTERM),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by SIGKILL", signal.SIGKILL),
        (faults.crash, "killed by SIGSEGV", signal.SIGSEGV),
    ],
    ids=["exit", "SIGTERM", "SIGKILL", "SIGSEGV"],
)
def test_exit_codes_and_signals_are_exact(server, end, text, number):
    def fail(mesh):
        if mesh.rank:
            end()
        time.sleep(60)

    with pytest.raises(mc.errors.RankError, match=f"rank 1 .*{text}") as caught:
        mc.launch(fail, TWO)
    assert (caught.value.rank, caught.value.signal) == (1, number)
    assert server.children() == []  # no zombie either
