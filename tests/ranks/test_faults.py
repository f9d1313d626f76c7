"""Whatever happens to a rank, its caller gets one error that names it, and no process is left."""

import os
import signal
import threading
import time

import pytest

import faults
import multicard as mc
from multicard.errors import CollectiveTimeout, RankError
from multicard.ranks import failure

BACKENDS = ["shm", "gloo"]


@pytest.fixture(scope="module")
def victims():
    """Ranks to hurt, by size and backend: restarted where the last test has ended them."""
    made: dict[tuple[str, str], mc.Ranks] = {}

    def get(backend: str, timeout: float = 20.0, **degrees: int) -> mc.Ranks:
        key = (backend, f"{degrees} {timeout}")
        if key not in made:
            made[key] = mc.Ranks(mc.ParallelConfig(**degrees), backend=backend, timeout=timeout)
        elif not made[key].alive:
            made[key].restart()
        return made[key]

    yield get
    for ranks in made.values():
        ranks.close()


# ---- death


def soaked(*cases):
    return [pytest.param(*case, marks=pytest.mark.soak) for case in cases]


KILLED = [  # each rank, moment, size and backend at least once; all of them in the soak
    ("shm", 3, 0, faults.in_collective),
    ("shm", 2, 1, faults.in_ring_step),
    ("shm", 4, 3, faults.in_load),
    ("gloo", 3, 1, faults.in_collective),
    ("gloo", 2, 0, faults.in_ring_step),
    ("gloo", 3, 2, faults.in_load),
]
ALL_KILLED = [
    (backend, size, victim, moment)
    for moment in (faults.in_load, faults.in_collective, faults.in_ring_step)
    for size, times in ((2, 1), (3, 5), (4, 1))
    for backend in BACKENDS
    for victim in [*range(size)] * times
]


@pytest.mark.parametrize(("backend", "size", "victim", "moment"), KILLED + soaked(*ALL_KILLED))
def test_a_killed_rank_is_named_and_takes_the_rest_along(victims, backend, size, victim, moment):
    ranks = victims(backend, **{"ring" if moment is faults.in_ring_step else "tp": size})
    pids = ranks.pids
    with pytest.raises(RankError, match=rf"rank {victim} was killed by SIGKILL \(signal 9\)") as caught:
        ranks.run(moment, victim, faults.kill)
    assert (caught.value.rank, caught.value.signal) == (victim, signal.SIGKILL)
    assert faults.gone(pids)
    with pytest.raises(RankError, match=f"these ranks have ended .*rank {victim} was killed"):
        ranks.run(lambda mesh: mesh.rank)


def test_a_rank_killed_while_idle_is_named_by_the_next_call(victims):
    ranks = victims("gloo", tp=3)
    pids = ranks.pids
    os.kill(pids[2], signal.SIGKILL)
    assert faults.gone(pids)
    assert not ranks.alive
    assert not ranks.told
    with pytest.raises(RankError, match=r"rank 2 was killed by SIGKILL .* while idle") as caught:
        ranks.run(lambda mesh: mesh.rank)
    assert (caught.value.rank, caught.value.signal) == (2, signal.SIGKILL)
    assert ranks.told
    ranks.restart()
    assert ranks.run(lambda mesh: mesh.rank) == [0, 1, 2]


def test_a_crash_and_an_exit_come_with_the_end_of_stderr(victims):
    with pytest.raises(RankError, match="rank 1 was killed by SIGSEGV") as caught:
        victims("shm", tp=3).run(faults.in_collective, 1, faults.crash)
    assert "Segmentation fault" in caught.value.stderr
    assert "in crash" in caught.value.stderr
    with pytest.raises(RankError, match="rank 2 exited with code 3 in in_collective") as caught:
        victims("shm", tp=3).run(faults.in_collective, 2, faults.leave)
    assert caught.value.stderr == "leaving"


def test_restart_makes_again_what_was_kept(victims):
    ranks = victims("shm", ring=2)
    for start in range(20):
        kept = ranks.keep(lambda mesh, start: {"rank": mesh.rank + start}, start)
    with pytest.raises(RankError):
        ranks.run(faults.in_collective, 0, faults.leave)
    ranks.restart()
    for _ in range(20):  # calls are numbered anew, and kept values aren't: closing a stream is not dropping one
        assert list(ranks.stream(lambda mesh: iter("ab"))) == ["a", "b"]
    assert ranks.run(lambda mesh, own: own["rank"], kept) == [19, 20]


def test_a_rank_that_dies_after_it_has_returned_is_named(victims):
    def work(mesh):
        if mesh.rank != 1:
            time.sleep(60)
        threading.Timer(0.2, faults.kill).start()

    with pytest.raises(RankError, match="rank 1 was killed by SIGKILL"):
        victims("shm", tp=3).run(work)


@pytest.mark.parametrize(
    ("code", "out_of_memory", "said"),
    [(-9, True, "the kernel ran out of memory"), (-9, False, "(signal 9) in load"), (-11, True, "in load")],
)
def test_memory_is_blamed_where_the_kernel_says_so(code, out_of_memory, said):
    died = failure.death(1, code, ["last words"], out_of_memory, doing="in load", moment=1.0)
    assert said in str(died.error)
    assert ("memory" in str(died.error)) == (code == -9 and out_of_memory)
    assert died.error.stderr == "last words"


# ---- exceptions


EACH = [(backend, size, victim) for backend in BACKENDS for size in (2, 3, 4) for victim in range(size)]


@pytest.mark.parametrize(("backend", "size", "victim"), [("shm", 3, 0), ("gloo", 3, 2), *soaked(*EACH)])
def test_an_exception_reaches_the_caller_while_others_wait(victims, backend, size, victim):
    ranks = victims(backend, tp=size)
    pids = ranks.pids
    with pytest.raises(LookupError, match="not in the index") as caught:
        ranks.run(faults.in_collective, victim, faults.fail)
    assert caught.value.__cause__.rank == victim
    assert "raised on rank" in caught.value.__notes__[0]
    assert "in fail" in caught.value.__notes__[0]
    assert faults.gone(pids)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("our store has timed out waiting for stock", failure.OWN),
        ("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:5", failure.CONSEQUENCE),
        ("[/gloo/transport/tcp/pair.cc:547] Read error [127.0.0.1]: Connection reset by peer", failure.CONSEQUENCE),
        ("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 2000ms for recv operation", failure.TIMEOUT),
        ("shape '[2]' is invalid for input of size 3", failure.OWN),
        ("my own timeout", failure.OWN),
    ],
)
def test_what_backends_say_is_understood(text, kind):
    error = ValueError("could not generate")
    error.__cause__ = RuntimeError(text)
    assert failure.describe(error, 0)[0].kind == kind


# ---- hangs


@pytest.mark.seam
def test_a_rank_that_has_left_is_named_without_waiting_for_the_timeout(victims):
    ranks = victims("shm", tp=3)
    with pytest.raises(
        CollectiveTimeout, match=r"rank 1 did not arrive at all_reduce number 5 at \S+faults.py"
    ) as caught:
        ranks.run(faults.left_early, 1)
    error = caught.value
    assert (error.rank, error.collective, error.sequence_number) == (1, "all_reduce", faults.WARM_UP + 2)
    assert str(error).endswith("it has left left_early")


HUNG = [(backend, 3, 1, fault) for backend in BACKENDS for fault in (faults.stop, faults.spin)]
ALL_HUNG = [(*each, fault) for each in EACH for fault in (faults.stop, faults.spin)]


@pytest.mark.parametrize(("backend", "size", "victim", "fault"), HUNG + soaked(*ALL_HUNG))
def test_a_rank_that_does_not_arrive_is_named(victims, backend, size, victim, fault):
    ranks = victims(backend, timeout=4.0, tp=size)
    pids = ranks.pids
    with pytest.raises(CollectiveTimeout, match=f"rank {victim} did not arrive at all_reduce number 5") as caught:
        ranks.run(faults.in_collective, victim, fault)
    error = caught.value
    assert (error.rank, error.collective, error.sequence_number) == (victim, "all_reduce", faults.WARM_UP + 2)
    assert "faults.py" in str(error)  # the call site
    assert ("it is stopped (SIGSTOP)" if fault is faults.stop else "(spin)") in str(error)
    notes = "\n".join(error.__notes__)
    assert all(f"rank {rank}" in notes for rank in range(len(pids)))
    assert "in in_collective" in notes
    assert faults.gone(pids)


def test_a_stopped_rank_that_nobody_waits_for_is_named(victims):
    def stop_alone(mesh):
        if mesh.rank == 1:
            faults.stop()

    with pytest.raises(CollectiveTimeout, match="rank 1 has been stopped"):
        victims("shm", timeout=4.0, tp=3).run(stop_alone)


def test_ranks_that_do_not_start_in_time_are_named(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(60)")
    with pytest.raises(CollectiveTimeout, match=r"ranks 0, 1 did not start within 0.1 s"):
        mc.Ranks(mc.ParallelConfig(tp=2), start_timeout=0.1, env={"PYTHONPATH": str(tmp_path)})
