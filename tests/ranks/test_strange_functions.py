"""Functions that do to their rank what no function should: what the caller is told, and what is left."""

import os
import subprocess
import sys
import time

import pytest

import faults
import multicard as mc
from multicard.errors import RankError

PAIR = mc.ParallelConfig(tp=2)


def test_a_forked_child_that_comes_back_is_no_rank():
    def work(mesh):
        if os.fork() == 0:
            return "child"
        os.wait()
        return mesh.rank

    with mc.Ranks(PAIR) as ranks:
        assert ranks.run(work) == [0, 1]
        assert ranks.run(lambda mesh: mesh.rank) == [0, 1]


def test_a_forked_child_that_raises_is_no_rank():
    def work(mesh):
        if os.fork() == 0:
            raise LookupError("in the child")
        os.wait()
        return mesh.rank

    assert mc.launch(work, PAIR) == [0, 1]


def test_writing_to_a_descriptor_of_ours():
    def work(mesh):
        for fd in range(3, 100):
            if os.path.exists(f"/proc/self/fd/{fd}") and "pipe" in os.readlink(f"/proc/self/fd/{fd}"):
                os.set_blocking(fd, False)
                try:
                    os.write(fd, b"\x10\0\0\0these aren't messages")
                except OSError:
                    continue
        time.sleep(60)

    with pytest.raises(RankError) as caught:
        mc.launch(work, PAIR)
    assert "has written to a descriptor of multicard's" in caught.value.stderr
    assert "memory" not in str(caught.value)


def test_closing_all_descriptors():
    with pytest.raises(RankError, match="exited with code 1 in <lambda>") as caught:
        mc.launch(lambda mesh: os.closerange(3, 1000), PAIR)
    assert "has closed its pipe to the parent" in caught.value.stderr


def in_a_session_of_its_own(mesh):
    return subprocess.Popen(["sleep", "600"], start_new_session=True).pid


def as_a_daemon(mesh):
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(write, str(os.getpid()).encode())
            time.sleep(600)
        os._exit(0)
    return int(os.read(read, 20))


@pytest.mark.parametrize("start", [in_a_session_of_its_own, as_a_daemon])
def test_what_a_function_starts_ends_with_its_rank(start):
    assert faults.gone(mc.launch(start, PAIR))


@pytest.mark.parametrize("start", [in_a_session_of_its_own, as_a_daemon])
def test_what_a_function_starts_ends_with_the_caller(start, tmp_path):
    script = tmp_path / "caller.py"
    script.write_text(
        "import os, sys, signal, multicard as mc\n"
        "from test_strange_functions import in_a_session_of_its_own, as_a_daemon, PAIR\n"
        "with mc.Ranks(PAIR) as ranks:\n"
        f"    print(*ranks.run({start.__name__}), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(faults.__file__)])
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    assert faults.gone(pids)
