"""The shm backend: every collective, on every dtype, size and sub-group, against gloo and against one process."""

import datetime
import gc
import itertools
import os

import pytest
import torch
import torch.distributed as dist

from multicard.errors import CollectiveTimeout, ConfigError, MismatchError, RankError, UnsupportedError

SIZES = (0, 1, 7, 1000, 16385, 300_001)  # the last two: above the flat all-reduce, above a window
GLOO_DTYPES = (torch.float32, torch.float64, torch.float16, torch.int8, torch.uint8, torch.int32, torch.int64)
ODD_DTYPES = (torch.bool, torch.bfloat16, torch.int16, torch.uint16, torch.uint32, torch.uint64, torch.complex64,
              torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2)  # fmt: skip


def values(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Small integers, whose sums and products are exact in any order: the same wherever they are computed."""
    generator = torch.Generator().manual_seed(100 * rank + numel)
    x = torch.randint(-2, 3, (numel,), generator=generator)
    return x.abs().to(dtype) if dtype in (torch.uint8, torch.uint16, torch.uint32, torch.uint64) else x.to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    )


def subgroups(size: int) -> list[list[int]]:
    return [[*range(size)], [0, size - 1], [*range(1, size)]] if size > 2 else [[0, 1]]


def collectives_on(group, numel: int, dtype: torch.dtype, all_ops: bool = False) -> dict[str, list[torch.Tensor]]:
    """What every collective gives this rank, by name."""
    ranks = dist.get_process_group_ranks(group)
    rank, size = dist.get_rank(group), len(ranks)
    root = ranks[numel % size]
    new = lambda n=numel: torch.empty(n, dtype=dtype)  # noqa: E731
    x = lambda: values(rank, numel, dtype)  # noqa: E731
    got = {}
    for name in ("SUM", "PRODUCT", "MIN", "MAX"):
        y = x()
        dist.all_reduce(y, getattr(dist.ReduceOp, name), group=group)
        got["all_reduce " + name] = [y]
    y = x()
    dist.broadcast(y, root, group=group)
    got["broadcast"] = [y]
    y = x()
    dist.reduce(y, root, group=group)
    got["reduce"] = [y] if dist.get_rank() == root else []
    outs = [new() for _ in ranks]
    dist.all_gather(outs, x(), group=group)
    got["all_gather"] = outs
    outs = [new() for _ in ranks] if dist.get_rank() == root else None
    dist.gather(x(), outs, root, group=group)
    got["gather"] = outs or []
    y = new()
    dist.scatter(
        y, [values(r, numel, dtype) for r in range(size)] if dist.get_rank() == root else None, root, group=group
    )
    got["scatter"] = [y]
    splits = [[(numel + r + 2 * to) % (numel + 1) for to in range(size)] for r in range(size)]
    out = new(sum(each[rank] for each in splits))
    dist.all_to_all_single(
        out, values(rank, sum(splits[rank]), dtype), [each[rank] for each in splits], splits[rank], group=group
    )
    got["all_to_all_single"] = [out]
    if numel:
        out = new(size * numel)
        dist.all_gather_single(out, x(), group=group)
        got["all_gather_single"] = [out]
        out = new()
        dist.reduce_scatter_single(out, values(rank, size * numel, dtype), group=group)
        got["reduce_scatter_single"] = [out]
        out = new()
        after, before = ranks[(rank + 1) % size], ranks[(rank - 1) % size]
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, x(), after, group), dist.P2POp(dist.irecv, out, before, group)]
        ):
            work.wait()
        got["ring"] = [out]
    dist.barrier(group)
    return got


def against_gloo(mesh, numel):
    """Everything of that size against gloo, in the whole group and in two of its parts."""
    for ranks in subgroups(dist.get_world_size()):
        shm, gloo = dist.new_group(ranks), dist.new_group(ranks, backend="gloo")
        if dist.get_rank() not in ranks:
            continue
        for dtype in GLOO_DTYPES if numel <= 1000 else (torch.float32, torch.float16):
            got, want = collectives_on(shm, numel, dtype), collectives_on(gloo, numel, dtype)
            for name in want:
                assert len(got[name]) == len(want[name]), (name, dtype, ranks)
                assert all(map(same, got[name], want[name])), (name, dtype, ranks)


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_collective_against_gloo(run_on, ranks, numel):
    run_on(against_gloo, numel, dp=ranks)


def odd_dtype(mesh, dtype):
    """What gloo doesn't have: reductions against torch's own in float64 or wider, copies bit for bit."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for numel in (1, 999, 70_001):
        mine = [values(r, numel, dtype) for r in range(size)]
        wide = torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else torch.int64
        stack = torch.stack([x.to(wide) for x in mine])
        wants = {"SUM": stack.sum(0), "PRODUCT": stack.prod(0)}
        if dtype not in (torch.uint16, torch.uint32, torch.uint64) and not dtype.is_complex:
            wants |= {"MIN": stack.amin(0), "MAX": stack.amax(0)}
        if not dtype.is_floating_point and not dtype.is_complex:
            wants |= {"BAND": stack[0].clone(), "BOR": stack[0].clone(), "BXOR": stack[0].clone()}
            for x in stack[1:]:
                wants["BAND"] &= x
                wants["BOR"] |= x
                wants["BXOR"] ^= x
        if dtype.is_floating_point:
            wants["AVG"] = stack.mean(0)
        for name, want in wants.items():
            if dtype.is_complex and name == "PRODUCT":
                continue  # torch.distributed refuses it itself
            x = mine[rank].clone()
            dist.all_reduce(x, getattr(dist.ReduceOp, name))
            assert same(x, want.to(dtype)), (name, numel)
        outs = [torch.empty_like(x) for x in mine]
        dist.all_gather(outs, mine[rank])
        x = mine[rank].clone()
        dist.broadcast(x, size - 1)
        assert all(map(same, outs, mine)), numel
        assert same(x, mine[-1]), numel


@pytest.mark.parametrize("dtype", ODD_DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [2, 3])
def test_dtypes_that_gloo_lacks(run_on, ranks, dtype):
    run_on(odd_dtype, dtype, dp=ranks)


def rank_order(mesh, dtype):
    """Real numbers: rank order, half types in float32, the same bits on all ranks and however it is called."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for numel in (100, 20_000, 500_000):
        mine = [torch.randn(numel, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(size)]
        want = mine[0].float() if dtype.itemsize == 2 else mine[0].clone()
        for x in mine[1:]:
            want += x
        want = want.to(dtype)
        x = mine[rank].clone()
        dist.all_reduce(x)
        part = torch.empty(numel // size, dtype=dtype)
        cut = numel // size * size
        dist.reduce_scatter_single(part, mine[rank][:cut])
        y = mine[rank].clone()
        dist.reduce(y, 0)
        assert same(x, want), numel
        assert same(part, want[:cut].chunk(size)[rank]), numel
        assert rank > 0 or same(y, want), numel
        own = mine[rank][:cut].clone()  # the result may be this rank's own contribution
        dist.reduce_scatter(own.chunk(size)[rank], list(own.chunk(size)))
        assert same(own.chunk(size)[rank], want[:cut].chunk(size)[rank]), numel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_sums_are_in_rank_order_and_float32(run_on, ranks, dtype):
    run_on(rank_order, dtype, dp=ranks)


def by_rank(size):
    return [torch.arange(24.0).view(4, 6) * (r + 1) for r in range(size)]


def strided(mesh):
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = by_rank(size)
    for numel in (24, 24 * 20_000):
        rows = [x.repeat(numel // 24, 1).t() for x in whole]
        x = rows[rank].clone(memory_format=torch.preserve_format)
        dist.all_reduce(x)
        outs = [torch.empty(numel // 6, 6).t() for _ in whole]
        dist.all_gather(outs, rows[rank])
        y = rows[rank].clone(memory_format=torch.preserve_format)
        dist.broadcast(y, 1)
        z = torch.empty(numel // 6, 6).t()
        works = [dist.isend(rows[rank], (rank + 1) % size), dist.irecv(z, (rank - 1) % size)]
        for work in works:
            work.wait()
        assert torch.equal(x, sum(rows)), numel
        assert all(map(torch.equal, outs, rows)), numel
        assert torch.equal(y, rows[1]), numel
        assert torch.equal(z, rows[rank - 1]), numel
        gathered = [torch.empty(numel // 6, 6).t() for _ in whole] if rank == 1 else None
        dist.gather(rows[rank], gathered, 1)
        assert rank != 1 or all(map(torch.equal, gathered, rows)), numel
        dist.scatter(z, rows if rank == 1 else None, 1)
        assert torch.equal(z, rows[rank]), numel


def parameters(mesh):
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = by_rank(size)
    weight = torch.nn.Parameter(whole[rank].clone())
    dist.broadcast(weight, 0)
    dist.all_reduce(weight)
    assert torch.equal(weight, size * whole[0])
    assert weight.grad_fn is None


def inference_mode(mesh):
    whole = by_rank(dist.get_world_size())[dist.get_rank()]
    group = dist.new_group()
    with torch.inference_mode():  # the group's first use, and each view's
        inside = whole.clone()
        dist.all_reduce(inside, group=group)
        collectives_on(group, 5, torch.float32)
    outside = whole.clone()
    dist.all_reduce(outside, group=group)
    collectives_on(group, 5, torch.float32)
    assert torch.equal(inside, outside)


def conjugates(mesh):
    rank, whole = dist.get_rank(), by_rank(dist.get_world_size())
    conj = torch.complex(whole[rank], -whole[rank]).conj()
    outs = [torch.empty_like(conj) for _ in whole]
    dist.group.WORLD.shm.all_gather(outs, conj)  # torch.distributed itself refuses these
    assert all(torch.equal(out, torch.complex(x, x)) for out, x in zip(outs, whole, strict=True))


@pytest.mark.parametrize("case", [strided, parameters, inference_mode, conjugates])
@pytest.mark.parametrize("ranks", [2, 3])
def test_any_tensor_is_as_a_dense_one(run_on, ranks, case):
    run_on(case, dp=ranks)


def alone(mesh):
    """A rank that is alone in its group: everything gives what it gave."""
    group = [dist.new_group([r]) for r in range(dist.get_world_size())][dist.get_rank()]
    for numel, dtype in itertools.product((0, 7, 300_001), (torch.float32, torch.bfloat16)):
        x = values(0, numel, dtype)
        for name, call in {
            "all_reduce": lambda out, x: dist.all_reduce(out.copy_(x), dist.ReduceOp.AVG, group=group),
            "reduce": lambda out, x: dist.reduce(out.copy_(x), group=group, group_dst=0),
            "broadcast": lambda out, x: dist.broadcast(out.copy_(x), group=group, group_src=0),
            "all_gather": lambda out, x: dist.all_gather([out], x, group=group),
            "gather": lambda out, x: dist.gather(x, [out], group=group, group_dst=0),
            "reduce_scatter": lambda out, x: dist.reduce_scatter(out, [x], group=group),
            "scatter": lambda out, x: dist.scatter(out, [x], group=group, group_src=0),
            "all_to_all": lambda out, x: dist.all_to_all([out], [x], group=group),
            "all_to_all_single": lambda out, x: dist.all_to_all_single(out, x, group=group),
        }.items():
            out = torch.full_like(x, 9)
            call(out, x)
            assert same(out, x), (name, numel, dtype)
    dist.barrier(group)


def test_a_rank_alone_in_its_group(run_on):
    run_on(alone, dp=2)


def neighbours():
    rank, size = dist.get_rank(), dist.get_world_size()
    return (rank + 1) % size, (rank - 1) % size


def tags(mesh):
    """Received in another order than sent; the longer ones are 12 MB each, above a channel's 8."""
    after, before = neighbours()
    for numel in (3, 3_000_000):
        sends = [dist.isend(torch.full((numel,), float(tag)), after, tag=tag) for tag in (1, 2, 3)]
        for tag in (3, 1, 2):
            part = torch.empty(numel)
            dist.recv(part, before, tag=tag)
            assert torch.equal(part, torch.full((numel,), float(tag))), (numel, tag)
        for work in sends:
            work.wait()


def zero_bytes(mesh):
    after, before = neighbours()
    empty = dist.isend(torch.empty(0), after)
    dist.recv(torch.empty(0), before)
    empty.wait()


def any_source(mesh):
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank > 0:
        dist.send(torch.full((2,), float(rank)), 0, tag=7)
        return
    seen = []
    for _ in range(size - 1):
        x = torch.empty(2)
        seen.append(dist.recv(x, tag=7))
        assert x.tolist() == [seen[-1]] * 2
    assert sorted(seen) == list(range(1, size))


def across_groups(mesh):
    """The others' messages can only end while rank 0 waits in another group."""
    rank, (after, before) = dist.get_rank(), neighbours()
    both = dist.new_group()
    out, big = torch.empty(5_000_000), torch.full((5_000_000,), float(rank))
    works = [dist.isend(big, after), dist.irecv(out, before)]
    if rank == 0:
        dist.barrier(both)
    for work in works:
        work.wait()
    if rank > 0:
        dist.barrier(both)
    assert torch.equal(out, torch.full((5_000_000,), float(before)))


def coalesced(mesh):
    after, before = neighbours()
    with dist._coalescing_manager(device=torch.device("cpu"), async_ops=True) as manager:
        x, y = torch.full((4,), float(dist.get_rank())), torch.empty(4)
        dist.isend(x, after)
        dist.irecv(y, before)
    manager.wait()
    assert y.tolist() == [before] * 4


def futures(mesh):
    size = dist.get_world_size()
    out, x = torch.empty(size), torch.full((size,), float(dist.get_rank()))
    work = dist.all_to_all_single(out, x, async_op=True)
    assert torch.equal(work.get_future().wait()[0], torch.arange(float(size)))
    assert torch.equal(out, torch.arange(float(size)))


def is_completed(mesh):
    after, before = neighbours()
    y = torch.empty(4)
    work = dist.irecv(y, before)
    assert not work.is_completed()
    dist.barrier()
    dist.isend(torch.ones(4), after)
    dist.barrier()
    assert work.is_completed()
    assert y.tolist() == [1.0] * 4


@pytest.mark.parametrize("case", [tags, zero_bytes, any_source, across_groups, coalesced, futures, is_completed])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_messages(run_on, ranks, case):
    run_on(case, dp=ranks)


def uneven(mesh, width, long):
    """An all_to_all that looks even to one rank, uneven to another, too long for a window to a third."""
    rank = dist.get_rank()
    sizes = [[2, long, 2], [2, 2, 2], [2, 2, 2]]  # by source, then destination
    data = [torch.randn(sum(row), width, generator=torch.Generator().manual_seed(r)) for r, row in enumerate(sizes)]
    takes = [row[rank] for row in sizes]
    out = torch.empty(sum(takes), width)
    dist.all_to_all_single(out, data[rank], takes, sizes[rank])
    assert torch.equal(out, torch.cat([x.split(row)[rank] for x, row in zip(data, sizes, strict=True)]))


@pytest.mark.parametrize("long", [2, 3, 9])
@pytest.mark.parametrize("width", [1, 60_000])
def test_an_exchange_that_looks_even_to_some_ranks(run_on, width, long):
    run_on(uneven, width, long, dp=3)


REFUSED = {  # what is called, and a word of what it is told
    "premul": (lambda x, **_: dist.all_reduce(x, dist._make_nccl_premul_sum(2.0)), "PREMUL_SUM"),
    "avg": (lambda x, **_: dist.all_reduce(x.int(), dist.ReduceOp.AVG), "torch.int32 by avg"),
    "band": (lambda x, **_: dist.all_reduce(x, dist.ReduceOp.BAND), "torch.float32 by band"),
    "unsigned": (lambda x, **_: dist.all_reduce(x.to(torch.uint16), dist.ReduceOp.MAX), "uint16"),
    "kernel": (lambda x, **_: dist.all_reduce(torch.zeros(4, dtype=torch.uint8).view(torch.bits8)), "bits8"),
    "quantized": (lambda x, **_: dist.broadcast(torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), 0), "qint8"),
    "device": (lambda x, **_: dist.all_reduce(x.to("meta")), "on meta"),
    "sparse": (lambda x, shm, **_: shm.all_reduce(x.to_sparse()), "sparse"),
    "expanded": (lambda x, **_: dist.all_reduce(torch.ones(1).expand(4)), "share"),
    "expanded receive": (lambda x, shm, **_: dist.irecv(torch.ones(1).expand(4), 1 - shm.rank), "share"),
    "gather": (lambda x, shm, **_: shm.all_gather([torch.ones(3)] * shm.size, x), "fit"),
    "gather dtype": (lambda x, shm, **_: shm.all_gather([x.double()] * shm.size, x), "float64"),
    "scatter": (lambda x, **_: dist.reduce_scatter_single(torch.ones(3), x), "4"),
    "exchange": (lambda x, shm, **_: shm.all_to_all([x] * (shm.size + 1), [x] * shm.size), "all_to_all"),
    "exchange own": (lambda x, shm, **_: shm.all_to_all([x] * shm.size, [x[: shm.rank + 1]] * shm.size), "itself"),
    "exchange rows": (lambda x, shm, **_: shm.all_to_all_single(x, x, [3, 2], [2, 2]), "[3, 2]"),
    "exchange dtype": (lambda x, shm, **_: shm.all_to_all_single(x.double(), x), "torch.float64"),
    "root": (lambda x, shm, **_: shm.broadcast(x, shm.size), "group rank 2"),
    "peer": (lambda x, shm, **_: shm.send([x], shm.rank), "group rank"),
}


def refused(mesh, call):
    x = torch.ones(4)
    with pytest.raises((UnsupportedError, ConfigError)) as caught:
        call(x=x, shm=dist.group.WORLD.shm)
    dist.all_reduce(x)  # nothing was said: the group goes on
    return str(caught.value), x.tolist()


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_have_is_refused_by_name(run_on, case):
    call, word = REFUSED[case]
    for said, after in run_on(refused, call, dp=2):
        assert word in said
        assert after == [2.0] * 4


def first(x, group):
    dist.all_reduce(x, group=group)


def second(x, group):
    dist.all_reduce(x, group=group)


DISAGREEMENTS = {  # what rank 0 and rank 1 call, and what both are told
    "operation": (
        lambda x, g: dist.broadcast(x, 0, group=g),
        lambda x, g: dist.all_reduce(x, group=g),
        "broadcast(8 × torch.float32, root 0)",
    ),
    "reduction": (first, lambda x, g: dist.all_reduce(x, dist.ReduceOp.MAX, group=g), "max)"),
    "dtype": (lambda x, g: dist.all_reduce(x.int(), group=g), first, "torch.int32"),
    "numel": (lambda x, g: dist.all_reduce(x[:4], group=g), first, "all_reduce(4 × torch.float32, sum)"),
    "root": (lambda x, g: dist.broadcast(x, 0, group=g), lambda x, g: dist.broadcast(x, 1, group=g), "root 1"),
}
FOUND_BY_THE_CHECK = {
    "site": (first, second, "test_shm.py"),
    "splits": (
        lambda x, g: dist.all_to_all_single(x[:2], x[2:5], [1, 1], [1, 2], group=g),
        lambda x, g: dist.all_to_all_single(x[:2], x[2:5], [1, 1], [2, 1], group=g),
        "sending [1, 2]",
    ),
}


def disagree(mesh, calls, checked):
    """What a rank is told whose call doesn't fit the other's."""
    group, x = dist.new_group(), torch.ones(8)
    group.shm.checked = checked
    dist.barrier(group)

    def call():
        calls[dist.get_rank()](x, group)
        dist.barrier(group)

    with pytest.raises(MismatchError) as caught:
        call()
    with pytest.raises(RankError, match="failed before"):
        dist.all_reduce(x, group=group)
    return caught.value.rank, str(caught.value)


@pytest.mark.seam
@pytest.mark.parametrize(
    ("case", "checked"), [*((case, False) for case in DISAGREEMENTS), *((case, True) for case in
    DISAGREEMENTS | FOUND_BY_THE_CHECK)]
)  # fmt: skip
def test_ranks_that_disagree_all_raise(run_on, case, checked):
    *calls, words = (DISAGREEMENTS | FOUND_BY_THE_CHECK)[case]
    (culprit, told), (culprit1, told1) = run_on(disagree, calls, checked, dp=2)
    assert culprit == culprit1
    assert words in told
    assert words in told1


def hold(mesh):
    """Where the memory is: anonymous, its owner's alone, and only as much as was used."""
    dist.barrier()
    group = dist.new_group()
    made = group.shm._handshake.fd
    before = group.shm.sync
    dist.all_reduce(torch.ones(4), group=group)
    with open("/proc/self/maps") as file:
        maps = {line.split(maxsplit=5)[5].strip() for line in file if "multicard" in line and "memfd" in line}
    stat = os.fstat(made) if made >= 0 else None
    return before is None, maps, (stat.st_mode & 0o777, stat.st_nlink, stat.st_blocks * 512) if stat else None


def test_memory_is_anonymous_private_and_as_large_as_used(run_on):
    (lazy, maps, stat), (lazy1, maps1, stat1) = run_on(hold, dp=2)
    assert lazy
    assert lazy1
    assert maps == maps1 == {"/memfd:multicard (deleted)"}
    mode, links, used = stat
    assert (mode, links, stat1) == (0o600, 0, None)
    assert used < 100_000


def lives(mesh):
    """Groups that are made, used and destroyed: what is left of them."""

    def held():
        gc.collect()
        with open("/proc/self/maps") as file:
            return sum("memfd:multicard" in line for line in file), len(os.listdir("/proc/self/fd"))

    before = held()
    for _ in range(5):
        groups = [dist.new_group() for _ in range(4)]
        for group in groups:
            collectives_on(group, 10, torch.float32)
        for group in groups:
            dist.destroy_process_group(group)
        del group, groups
    dist.barrier()
    return before, held()


def test_destroyed_groups_leave_nothing(run_on):
    for before, after in run_on(lives, dp=3):
        assert after == before


def lateness(mesh):
    """A timeout that was set later, on a group in which the other ranks don't call."""
    group, said = dist.new_group(), None
    dist.barrier(group)
    group.set_timeout(datetime.timedelta(seconds=0.2))
    for caller in (0, 1):
        if dist.get_rank() == caller:
            try:
                dist.all_reduce(torch.ones(2), group=group)
            except RankError as error:
                said = (type(error).__name__, error.rank, error.collective, error.sequence_number, str(error))
        dist.barrier()  # another group is as it was
    return said


def test_timeouts_are_set_by_group_and_name_who_is_late(run_on):
    first, second, _ = run_on(lateness, dp=3)
    assert issubclass(CollectiveTimeout, TimeoutError)
    assert first[:4] == ("CollectiveTimeout", 1, "all_reduce", 2)
    assert "ranks 1, 2 did not arrive within 0.2 s" in first[4]
    assert second[:2] == ("CollectiveTimeout", 2)  # rank 0 had come before it gave up
