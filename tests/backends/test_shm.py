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


def matrix(mesh):
    """Everything against gloo; the names of what differs."""
    rank, wrong = dist.get_rank(), []
    for ranks in subgroups(dist.get_world_size()):
        shm, gloo = dist.new_group(ranks), dist.new_group(ranks, backend="gloo")
        if rank not in ranks:
            continue
        for numel, dtype in itertools.product(SIZES, GLOO_DTYPES):
            if numel > 1000 and dtype not in (torch.float32, torch.float16):
                continue
            got, want = collectives_on(shm, numel, dtype), collectives_on(gloo, numel, dtype)
            for name in want:
                if len(got[name]) != len(want[name]) or not all(map(same, got[name], want[name])):
                    wrong.append((name, numel, dtype, ranks))
    return wrong


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_collective_against_gloo(run_on, ranks):
    assert run_on(matrix, dp=ranks) == [[]] * ranks


def odd_dtypes(mesh):
    """What gloo doesn't have: reductions against torch's own in float64 or wider, copies bit for bit."""
    rank, size, wrong = dist.get_rank(), dist.get_world_size(), []
    for numel, dtype in itertools.product((1, 999, 70_001), ODD_DTYPES):
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
            if not same(x, want.to(dtype)):
                wrong.append((name, numel, dtype))
        outs = [torch.empty_like(x) for x in mine]
        dist.all_gather(outs, mine[rank])
        x = mine[rank].clone()
        dist.broadcast(x, size - 1)
        if not all(map(same, outs, mine)) or not same(x, mine[-1]):
            wrong.append(("copies", numel, dtype))
    return wrong


@pytest.mark.parametrize("ranks", [2, 3])
def test_dtypes_that_gloo_lacks(run_on, ranks):
    assert run_on(odd_dtypes, dp=ranks) == [[]] * ranks


def rank_order(mesh):
    """Real numbers: rank order, half types in float32, the same bits on all ranks and however it is called."""
    rank, size, found = dist.get_rank(), dist.get_world_size(), []
    for numel, dtype in itertools.product((100, 20_000, 500_000), (torch.float32, torch.bfloat16, torch.float16)):
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
        found.append(same(x, want) and same(part, want[:cut].chunk(size)[rank]) and (rank > 0 or same(y, want)))
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_sums_are_in_rank_order_and_float32(run_on, ranks):
    assert all(map(all, run_on(rank_order, dp=ranks)))


def strided(mesh):
    """Tensors of any strides, gradients, inference mode: as a dense one would."""
    rank, size, wrong = dist.get_rank(), dist.get_world_size(), []
    whole = [torch.arange(24.0).view(4, 6) * (r + 1) for r in range(size)]
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
        if not (torch.equal(x, sum(rows)) and all(map(torch.equal, outs, rows)) and torch.equal(y, rows[1])):
            wrong.append(("strides", numel))
        if not torch.equal(z, rows[rank - 1]):
            wrong.append(("messages", numel))
    weight = torch.nn.Parameter(whole[rank].clone())
    dist.broadcast(weight, 0)
    dist.all_reduce(weight)
    if not torch.equal(weight, size * whole[0]) or weight.grad_fn is not None:
        wrong.append("parameter")
    group = dist.new_group()
    with torch.inference_mode():  # the group's first use, and each view's
        inside = whole[rank].clone()
        dist.all_reduce(inside, group=group)
        collectives_on(group, 5, torch.float32)
    outside = whole[rank].clone()
    dist.all_reduce(outside, group=group)
    collectives_on(group, 5, torch.float32)
    if not torch.equal(inside, outside):
        wrong.append("inference mode")
    conj = torch.complex(whole[rank], -whole[rank]).conj()
    outs = [torch.empty_like(conj) for _ in whole]
    dist.group.WORLD.shm.all_gather(outs, conj)  # torch.distributed itself refuses these
    if not all(torch.equal(out, torch.complex(x, x)) for out, x in zip(outs, whole, strict=True)):
        wrong.append("conj")
    return wrong


@pytest.mark.parametrize("ranks", [2, 3])
def test_strides_gradients_and_inference_mode(run_on, ranks):
    assert run_on(strided, dp=ranks) == [[]] * ranks


def messages(mesh):
    """Tags, any source, zero bytes, more than fits a channel both ways, and progress across groups."""
    rank, size, wrong = dist.get_rank(), dist.get_world_size(), []
    after, before = (rank + 1) % size, (rank - 1) % size

    def expect(name, got, want):
        if not torch.equal(got, want):
            wrong.append(name)

    for numel in (3, 3_000_000):  # the second: 12 MB, above a channel's 8
        sends = [dist.isend(torch.full((numel,), float(tag)), after, tag=tag) for tag in (1, 2, 3)]
        parts = {tag: torch.empty(numel) for tag in (3, 1, 2)}
        for tag, part in parts.items():  # not in the order sent
            dist.recv(part, before, tag=tag)
            expect("tag", part, torch.full((numel,), float(tag)))
        for work in sends:
            work.wait()
    empty = dist.isend(torch.empty(0), after)
    dist.recv(torch.empty(0), before)
    empty.wait()
    if rank == 0:
        seen = []
        for _ in range(size - 1):
            x = torch.empty(2)
            seen.append(dist.recv(x, tag=7))
            expect("any source", x, torch.full((2,), float(seen[-1])))
        if sorted(seen) != list(range(1, size)):
            wrong.append(("any source", seen))
    else:
        dist.send(torch.full((2,), float(rank)), 0, tag=7)
    both = dist.new_group()
    out, big = torch.empty(5_000_000), torch.full((5_000_000,), float(rank))
    works = [dist.isend(big, after), dist.irecv(out, before)]
    if rank == 0:  # the others' messages can only end while rank 0 waits in another group
        dist.barrier(both)
    for work in works:
        work.wait()
    if rank > 0:
        dist.barrier(both)
    expect("across groups", out, torch.full((5_000_000,), float(before)))
    with dist._coalescing_manager(device=torch.device("cpu"), async_ops=True) as manager:
        x, y = torch.full((4,), float(rank)), torch.empty(4)
        dist.isend(x, after)
        dist.irecv(y, before)
    manager.wait()
    expect("coalesced", y, torch.full((4,), float(before)))
    work = dist.all_to_all_single(z := torch.empty(size), torch.full((size,), float(rank)), async_op=True)
    expect("future", work.get_future().wait()[0], torch.arange(float(size)))
    expect("all_to_all", z, torch.arange(float(size)))
    work = dist.irecv(y, before)
    if work.is_completed():
        wrong.append("complete before it was sent")
    dist.barrier()
    dist.isend(torch.ones(4), after)
    dist.barrier()
    if not work.is_completed():
        wrong.append("not complete after it was sent")
    expect("is_completed", y, torch.ones(4))
    return wrong


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_messages(run_on, ranks):
    assert run_on(messages, dp=ranks) == [[]] * ranks


def splits(mesh):
    """An all_to_all that looks even to one rank, uneven to another, too long for a window to a third."""
    rank, wrong = dist.get_rank(), []
    for width, long in itertools.product((1, 60_000), (2, 3, 9)):
        sizes = [[2, long, 2], [2, 2, 2], [2, 2, 2]]  # by source, then destination
        data = [torch.randn(sum(row), width, generator=torch.Generator().manual_seed(r)) for r, row in enumerate(sizes)]
        takes = [row[rank] for row in sizes]
        out = torch.empty(sum(takes), width)
        dist.all_to_all_single(out, data[rank], takes, sizes[rank])
        if not torch.equal(out, torch.cat([x.split(row)[rank] for x, row in zip(data, sizes, strict=True)])):
            wrong.append((width, long))
    return wrong


def test_an_exchange_that_looks_even_to_some_ranks(run_on):
    assert run_on(splits, dp=3) == [[]] * 3


def refused(mesh):
    """What is refused, by name, before anything was said: the group goes on."""
    rank, size = dist.get_rank(), dist.get_world_size()
    x, said = torch.ones(4), {}
    shm = dist.group.WORLD.shm
    for name, call in {
        "premul": lambda: dist.all_reduce(x, dist._make_nccl_premul_sum(2.0)),
        "avg": lambda: dist.all_reduce(x.int(), dist.ReduceOp.AVG),
        "band": lambda: dist.all_reduce(x, dist.ReduceOp.BAND),
        "unsigned": lambda: dist.all_reduce(x.to(torch.uint16), dist.ReduceOp.MAX),
        "kernel": lambda: dist.all_reduce(torch.zeros(4, dtype=torch.uint8).view(torch.bits8)),
        "quantized": lambda: dist.broadcast(torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), 0),
        "device": lambda: dist.all_reduce(x.to("meta")),
        "sparse": lambda: shm.all_reduce(x.to_sparse()),
        "expanded": lambda: dist.all_reduce(torch.ones(1).expand(4)),
        "expanded receive": lambda: dist.irecv(torch.ones(1).expand(4), (rank + 1) % size),
        "gather": lambda: shm.all_gather([torch.ones(3)] * size, x),
        "gather dtype": lambda: shm.all_gather([x.double()] * size, x),
        "scatter": lambda: dist.reduce_scatter_single(torch.ones(3), x),
        "exchange": lambda: shm.all_to_all([x] * (size + 1), [x] * size),
        "exchange own": lambda: shm.all_to_all([x] * size, [x[: rank + 1]] * size),
        "exchange rows": lambda: shm.all_to_all_single(x, x, [3, 2], [2, 2]),
        "exchange dtype": lambda: shm.all_to_all_single(x.double(), x),
        "root": lambda: shm.broadcast(x, size),
        "peer": lambda: shm.send([x], rank),
    }.items():
        try:
            call()
        except (UnsupportedError, ConfigError) as error:
            said[name] = str(error)
    dist.all_reduce(x)
    return said, x.tolist()


def test_what_it_does_not_have_is_refused_by_name(run_on):
    for said, after in run_on(refused, dp=2):
        assert after == [2.0] * 4
        words = {
            "premul": "PREMUL_SUM",
            "avg": "torch.int32 by avg",
            "band": "torch.float32 by band",
            "unsigned": "uint16",
            "kernel": "bits8",
            "quantized": "qint8",
            "device": "on meta",
            "sparse": "sparse",
            "expanded": "share",
            "expanded receive": "share",
            "gather": "fit",
            "gather dtype": "float64",
            "scatter": "4",
            "exchange": "all_to_all",
            "exchange own": "itself",
            "exchange rows": "[3, 2]",
            "exchange dtype": "torch.float64",
            "root": "group rank 2",
            "peer": "group rank",
        }
        assert said.keys() == words.keys()
        for name, word in words.items():
            assert word in said[name], (name, said[name])


def disagreements(mesh, checked):
    """Calls that don't fit one another, each in a group of its own: what each rank is told."""
    rank, told = dist.get_rank(), {}
    x = torch.ones(8)

    def first(group):
        dist.all_reduce(x, group=group)

    def second(group):
        dist.all_reduce(x, group=group)

    cases = {
        "operation": lambda g: dist.all_reduce(x, group=g) if rank else dist.broadcast(x, 0, group=g),
        "reduction": lambda g: dist.all_reduce(x, [dist.ReduceOp.SUM, dist.ReduceOp.MAX][rank % 2], group=g),
        "dtype": lambda g: dist.all_reduce(x if rank else x.int(), group=g),
        "numel": lambda g: dist.all_reduce(x if rank else x[:4], group=g),
        "root": lambda g: dist.broadcast(x, rank % 2, group=g),
    }
    if checked:
        cases |= {
            "site": lambda g: first(g) if rank else second(g),
            "splits": lambda g: dist.all_to_all_single(x[:2], x[2:5], [1, 1], [2, 1] if rank else [1, 2], group=g),
        }
    for name, call in cases.items():
        group = dist.new_group()
        group.shm.checked = checked
        dist.barrier(group)
        try:
            call(group)
            dist.barrier(group)
        except MismatchError as error:
            told[name] = (error.rank, error.collective, str(error))
        try:
            dist.all_reduce(x, group=group)
        except RankError as error:
            told[name] = (*told[name], "failed before" in str(error))
    return told


@pytest.mark.seam
@pytest.mark.parametrize("checked", [False, True])
def test_ranks_that_disagree_all_raise(run_on, checked):
    told = run_on(disagreements, checked, dp=2)
    names = {"operation", "reduction", "dtype", "numel", "root"} | ({"site", "splits"} if checked else set())
    for each in told:
        assert each.keys() == names
        assert all(after for *_, after in each.values())
    words = {
        "operation": "broadcast(8 × torch.float32, root 0)",
        "reduction": "max)",
        "dtype": "torch.int32",
        "numel": "all_reduce(4 × torch.float32, sum)",
        "root": "root 1",
        "site": "test_shm.py",
        "splits": "sending [1, 2]",
    }
    for name in names:
        assert told[0][name][:1] == told[1][name][:1]
        assert words[name] in told[0][name][2], told[0][name][2]
        assert words[name] in told[1][name][2], told[1][name][2]


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
