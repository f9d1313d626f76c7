"""With the check on, ranks that disagree get one named error on every rank: never silence, never an abort."""

import datetime

import pytest
import torch
import torch.distributed as dist

import multicard as mc
from multicard import collectives
from multicard.errors import MismatchError, MulticardError


def ones(*shape, dtype=torch.float32):
    return torch.ones(*shape, dtype=dtype)


def different_numel(group, odd):
    dist.all_reduce(ones(8 if odd else 4), group=group)


def different_shape(group, odd):
    dist.all_reduce(ones(4, 2) if odd else ones(2, 4), group=group)


def different_dtype(group, odd):
    dist.all_reduce(ones(4, dtype=torch.bfloat16 if odd else torch.float16), group=group)


def different_reduction(group, odd):
    dist.all_reduce(ones(4), dist.ReduceOp.MAX if odd else dist.ReduceOp.SUM, group=group)


def different_order(group, odd):
    calls = [lambda: dist.all_reduce(ones(4), group=group), lambda: dist.broadcast(ones(4), group=group, group_src=0)]
    for call in reversed(calls) if odd else calls:
        call()


def swapped_calls_of_one_shape(group, odd):
    first, second = ones(4), ones(4)
    if odd:
        dist.all_reduce(second, group=group)
        dist.all_reduce(first, group=group)
    else:
        dist.all_reduce(first, group=group)
        dist.all_reduce(second, group=group)


def different_root(group, odd):
    dist.broadcast(ones(4), group=group, group_src=int(odd))


def different_lengths_gathered(group, odd):
    n = 6 if odd else 4
    dist.all_gather([ones(n) for _ in range(group.size())], ones(n), group=group)


def splits_that_do_not_meet(group, odd):
    sent = [2] * group.size()
    received = list(sent)
    if odd:
        sent[(group.rank() + 1) % group.size()] = 1
    dist.all_to_all_single(torch.empty(sum(received)), ones(sum(sent)), received, sent, group=group)


def more_taken_than_sent(group, odd):
    sent, received = [2] * group.size(), [2] * group.size()
    if not odd:
        received[-1] = 4
    dist.all_to_all_single(torch.empty(sum(received)), ones(sum(sent)), received, sent, group=group)


def barrier_against_all_reduce(group, odd):
    if odd:
        dist.barrier(group=group)
    else:
        dist.all_reduce(ones(4), group=group)


def short_send(group, odd):
    if odd:
        return dist.isend(ones(3), group=group, group_dst=0)  # not waited for: nobody will take it
    if group.rank() == 0:
        dist.recv(ones(4), group=group, group_src=group.size() - 1)
    return None


def send_of_another_dtype(group, odd):
    if odd:
        return dist.isend(ones(4, dtype=torch.int32), group=group, group_dst=0)
    if group.rank() == 0:
        dist.recv(ones(4), group=group, group_src=group.size() - 1)
    return None


COLLECTIVES = [
    different_numel,
    different_shape,
    different_dtype,
    different_reduction,
    different_order,
    swapped_calls_of_one_shape,
    different_root,
    different_lengths_gathered,
    splits_that_do_not_meet,
    more_taken_than_sent,
    barrier_against_all_reduce,
]
MESSAGES = {"gloo": [short_send, send_of_another_dtype], "auto": [short_send]}  # shm's messages have a length only


def call(mesh, case):
    """A case on a group of its own, which it spoils; the last rank is the odd one. What this rank is told."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=30))
    told = under_way = None
    try:
        under_way = case(group, mesh.rank == mesh.world_size - 1)
    except Exception as error:
        told = error
    dist.barrier()  # what is under way is kept until its receiver has seen it
    del under_way
    return told


BACKENDS = [pytest.param("auto", id="shm"), "gloo"]  # the names of the pools that other tests use too


def check_told(told):
    """Every rank raises, and names what each of them calls."""
    ranks = range(len(told))
    for error in told:
        assert isinstance(error, MismatchError), told
        assert error.rank in ranks
        assert all(f"rank {rank} calls " in str(error) for rank in ranks), error


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", COLLECTIVES)
def test_every_disagreement_is_named_on_every_rank(run_on, case, backend):
    check_told(run_on(call, case, backend=backend, tp=3))


@pytest.mark.soak
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", COLLECTIVES)
def test_every_disagreement_is_named_at_other_sizes(run_on, case, size, backend):
    check_told(run_on(call, case, backend=backend, tp=size))


@pytest.mark.parametrize(("backend", "case"), [(name, case) for name in MESSAGES for case in MESSAGES[name]])
def test_a_wrong_message_is_named_by_its_receiver(run_on, case, backend):
    told, *_ = run_on(call, case, backend=backend, tp=3)
    assert isinstance(told, MismatchError)
    assert "rank 2 sen" in str(told)


@pytest.mark.seam
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_agrees_is_let_through(run_on, backend):
    def agree(mesh):
        axis, n, r = mesh.tp, mesh.tp.size, mesh.tp.rank
        x = torch.arange(6.0) + r
        shift = collectives.RingShift(axis)
        shift.start([x, x.bfloat16()])
        moved = shift.wait()
        same = x.clone()
        if r == 0:  # root and others from different lines
            collectives.broadcast(same, axis)
        else:
            collectives.broadcast(same, axis)
        sizes = tuple(range(1, n + 1))
        rows = collectives.all_to_all(x[: n * 2], axis, [2] * n, [2] * n)
        scattered = torch.empty(2)
        dist.reduce_scatter(scattered, list(x.clone().split(2)), group=axis.group)
        return {
            "sum": collectives.all_reduce(x.clone(), axis),
            "gathered": collectives.all_gather(x[: sizes[r]], axis, sizes=sizes),
            "scattered": scattered,
            "moved": moved[0] + moved[1].float(),
            "same": same,
            "rows": rows,
            "half": collectives.all_reduce(x.bfloat16(), axis),
        }

    out = run_on(agree, backend=backend, tp=3)
    base = torch.arange(6.0)
    for r, values in enumerate(out):
        assert torch.equal(values["sum"], 3 * base + 3)
        assert torch.equal(values["half"], (3 * base + 3).bfloat16())
        assert torch.equal(values["gathered"], torch.cat([base[: i + 1] + i for i in range(3)]))
        assert torch.equal(values["scattered"], (3 * base + 3).split(2)[r])
        assert torch.equal(values["moved"], 2 * (base + (r - 1) % 3))
        assert torch.equal(values["same"], base)
        assert torch.equal(values["rows"], torch.cat([base[2 * r : 2 * r + 2] + i for i in range(3)]))


@pytest.mark.seam
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_launcher_raises_it(run_on, backend):
    with pytest.raises(MismatchError, match="all_reduce") as caught:
        run_on(lambda mesh: different_shape(mesh.tp.group, mesh.rank == 1), backend=backend, tp=3)
    assert isinstance(caught.value, MulticardError)
    assert caught.value.rank is not None


def test_only_gloo_and_shm_on_cpus_can_be_checked(monkeypatch):
    from multicard import join

    monkeypatch.setenv("MULTICARD_CHECK", "1")
    assert join.pick_backend("auto", torch.device("cpu"), one_host=False) == "cpu:checked_gloo"
    with pytest.raises(mc.errors.UnsupportedError, match="for CPU ranks, not cuda"):
        join.pick_backend("auto", torch.device("cuda"))
