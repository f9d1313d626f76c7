"""A rank of an LLM dies or hangs at any moment: the caller has one error that names it, and then the next answer."""

import contextlib
import itertools
import os
import signal

import pytest

import faults
import multicard as mc
import tiny_decoders as tiny
from multicard import collectives
from multicard.errors import CollectiveTimeout, RankError
from multicard.weights import Checkpoint

NAME = "llama-6-over-2"
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6] * 6  # a length that 2, 3 and 4 ranks share evenly: the schedule is then the ring
MOMENTS = ["load", "prefill", "ring step", "decode", "idle"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("faults"), NAME)[0]


@pytest.fixture(scope="module", params=["shm", "gloo"])
def ring(request, checkpoint):
    """Its prompt is shared by ranks and goes round between them."""
    with mc.LLM(checkpoint, ring=2, backend=request.param, timeout=30) as ring:
        yield ring


@contextlib.contextmanager
def loading(model, victim, fault):
    """The victim's fault happens instead of its third read, in whatever is loaded inside."""
    kept, (whole, args, kwargs) = next(iter(model._ranks._kept.items()))

    def load(mesh, *args):
        if mesh.rank == victim:
            reads, read = itertools.count(), Checkpoint.read
            Checkpoint.read = lambda *each: fault() if next(reads) == 2 else read(*each)
        return whole(mesh, *args)

    model._ranks._kept[kept] = (load, args, kwargs)
    try:
        yield
    finally:
        model._ranks._kept[kept] = (whole, args, kwargs)


def arm(mesh, slot, victim, moment, fault):
    """Have the victim's fault happen in its next prefill, ring step or decode step."""
    if mesh.rank != victim:
        return

    def layer(module, args):
        if (args[0].shape[1] == 1) == (moment == "decode"):
            fault()

    if moment == "ring step":
        collectives.RingShift.wait = lambda shift: fault()
    else:
        slot.model.layers[1].register_forward_pre_hook(layer)


def hurt(model, victim, moment, fault):
    if moment == "load":
        with loading(model, victim, fault):
            model.restart()
    elif moment == "idle":
        model._ranks.run(lambda mesh: mesh.rank)
        os.kill(model.pids[victim], signal.SIGKILL)
        assert faults.gone(model.pids)
    else:
        model._run(arm, victim, moment, fault)
    model.generate(PROMPT, max_new_tokens=4)


def check_kill(model, victim, moment):
    answer = model.generate(PROMPT, max_new_tokens=4).token_ids
    with pytest.raises(RankError, match=rf"rank {victim} was killed by SIGKILL \(signal 9\)") as caught:
        hurt(model, victim, moment, faults.kill)
    assert (caught.value.rank, caught.value.signal) == (victim, 9)
    assert faults.gone(model.pids)
    assert model.generate(PROMPT, max_new_tokens=4).token_ids == answer


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_rank_that_dies_at_any_moment_is_named(ring, moment):
    check_kill(ring, MOMENTS.index(moment) % 2, moment)


def test_nothing_listens_outside_loopback(ring):
    ring.generate(PROMPT, max_new_tokens=2)
    assert {ip for ip, _ in faults.listeners([os.getpid(), *ring.pids])} <= {"127.0.0.1", "::1"}


@pytest.mark.parametrize(("moment", "fault"), [("load", faults.spin), ("decode", faults.stop)])
def test_a_rank_that_hangs_is_named_with_the_collective(checkpoint, moment, fault):
    with mc.LLM(checkpoint, tp=2, timeout=5) as model:
        with pytest.raises(CollectiveTimeout, match=r"rank 1 did not arrive at \w+ number \d+") as caught:
            hurt(model, 1, moment, fault)
        assert caught.value.rank == 1
        assert caught.value.collective
        assert caught.value.sequence_number > 0
        assert faults.gone(model.pids)


@pytest.mark.soak
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("backend", ["shm", "gloo"])
@pytest.mark.parametrize(("size", "times"), [(2, 1), (3, 5), (4, 1)])
@pytest.mark.parametrize("moment", MOMENTS)
def test_every_rank_that_dies_is_named(checkpoint, backend, size, times, moment):
    with mc.LLM(checkpoint, ring=size, backend=backend, timeout=30) as model:
        for victim in list(range(size)) * times:
            check_kill(model, victim, moment)
