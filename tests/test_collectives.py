"""The collectives on an axis, on shared memory and on gloo, against what one process computes in float64."""

import itertools

import pytest
import torch

from multicard import collectives, partition, single
from multicard.errors import ConfigError

BACKENDS = ("auto", "gloo")
RANKS = (2, 3, 4)


def contribution(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What a rank brings: the same wherever it is computed."""
    generator = torch.Generator().manual_seed(1000 * rank + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype = torch.float32) -> bool:
    bound = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]  # one rounding
    return got.dtype == dtype and bool((got.double() - want).abs().max() <= bound * want.abs().max())


def reduces(mesh):
    axis = mesh.world
    for dtype, shape in itertools.product((torch.float32, torch.bfloat16, torch.float16), ((7,), (3, 5, 2), (70001,))):
        mine = [contribution(r, *shape, dtype=dtype) for r in range(axis.size)]
        exact = torch.stack(mine).double()
        for op, want in (("sum", exact.sum(0)), ("max", exact.amax(0)), ("min", exact.amin(0))):
            assert close(collectives.all_reduce(mine[axis.rank].clone(), axis, op), want, dtype), (op, dtype, shape)
        strided = mine[axis.rank].unsqueeze(-1).expand(*shape, 2)  # elements that share memory
        want = exact.sum(0).unsqueeze(-1).expand(*shape, 2)
        assert close(collectives.all_reduce(strided, axis), want, dtype), ("strided", dtype, shape)


def gathers(mesh):
    axis = mesh.world
    for length, dim in itertools.product((0, 1, 5, 9, 4000), (0, 1, -1)):
        sizes = partition.split_sizes(length, axis.size)
        shapes = [[3, 2, 4] for _ in sizes]
        for shape, size in zip(shapes, sizes, strict=True):
            shape[dim] = size
        mine = [contribution(r, *shape) for r, shape in enumerate(shapes)]
        got = collectives.all_gather(mine[axis.rank], axis, dim, sizes)
        assert torch.equal(got, torch.cat(mine, dim)), (length, dim)
        if len(set(sizes)) == 1:
            assert torch.equal(collectives.all_gather(mine[axis.rank], axis, dim), got), (length, dim, "no sizes")


def exchanges(mesh):
    axis = mesh.world
    for base in (0, 1, 1000):
        sends = [[(r + 2 * to + base) % 5 + base for to in range(axis.size)] for r in range(axis.size)]
        mine = [contribution(r, sum(send), 3) for r, send in enumerate(sends)]
        receives = [send[axis.rank] for send in sends]
        got = collectives.all_to_all(mine[axis.rank], axis, sends[axis.rank], receives)
        parts = [x.split(send)[axis.rank] for x, send in zip(mine, sends, strict=True)]
        assert torch.equal(got, torch.cat(parts)), ("uneven", base)
        even = [contribution(r, 2 * axis.size, base + 1) for r in range(axis.size)]
        want = torch.cat([x.chunk(axis.size)[axis.rank] for x in even])
        assert torch.equal(collectives.all_to_all(even[axis.rank], axis), want), ("even", base)


def broadcasts(mesh):
    axis = mesh.world
    for source in range(axis.size):
        got = collectives.broadcast(contribution(axis.rank, 4, 5).t(), axis, source)
        assert torch.equal(got, contribution(source, 4, 5).t()), source
    collectives.barrier(axis)


def rings(mesh):
    axis = mesh.world
    shift = collectives.RingShift(axis)
    lengths = [(3 * r) % 4 for r in range(axis.size)]  # one is empty
    held = [contribution(axis.rank, lengths[axis.rank], 2), contribution(axis.rank, 700_000).bfloat16()]
    for step in range(1, axis.size):
        owner = (axis.rank - step) % axis.size
        shift.start(held, [(lengths[owner], 2), (700_000,)])
        held = shift.wait()
        wanted = [contribution(owner, lengths[owner], 2), contribution(owner, 700_000).bfloat16()]
        assert all(torch.equal(got, want) for got, want in zip(held, wanted, strict=True)), (step, owner)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("check", [reduces, gathers, exchanges, broadcasts, rings], ids=lambda f: f.__name__)
def test_against_one_process(run_on, check, ranks, backend):
    run_on(check, dp=ranks, backend=backend)


def test_a_size_of_one_is_the_identity():
    axis, x = single().tp, torch.randn(3, 4)
    assert collectives.all_reduce(x, axis) is x
    assert collectives.all_gather(x, axis) is x
    assert collectives.all_to_all(x, axis) is x
    assert collectives.broadcast(x, axis) is x
    collectives.barrier(axis)
    shift = collectives.RingShift(axis)
    shift.start([x])
    assert shift.wait()[0] is x


def refusals(mesh):
    axis, said = mesh.world, []
    x = torch.zeros(3, 2)
    for call in (
        lambda: collectives.all_gather(x, axis, 0, [3]),
        lambda: collectives.all_gather(x, axis, 0, [2] * axis.size),
        lambda: collectives.all_to_all(x, axis, [1] * axis.size),
    ):
        try:
            call()
            said.append("nothing")
        except ConfigError as error:
            said.append(str(error).split(":")[0])
    collectives.barrier(axis)  # nobody is left waiting
    return said


def test_sizes_that_do_not_fit_are_refused_on_every_rank(run_on):
    assert run_on(refusals, dp=2) == [["all_gather", "all_gather", "all_to_all"]] * 2


def compiled(mesh):
    """Whether all collectives, with uneven sizes, are in one compiled graph, and give what they give without it."""
    axis = mesh.world
    table = [[1 + source + to for to in range(axis.size)] for source in range(axis.size)]
    sizes, receive = list(map(sum, table)), [row[axis.rank] for row in table]

    def step(x, dtype):
        whole = collectives.all_reduce(x * 2, axis)
        mine = whole[:, : sizes[axis.rank]] + axis.rank
        told = collectives.broadcast(x + axis.rank, axis, source=axis.size - 1)
        gathered = collectives.all_gather(mine, axis, -1, sizes)
        exchanged = collectives.all_to_all(mine.t(), axis, table[axis.rank], receive)
        return whole, told, gathered, exchanged, collectives.all_reduce((x / 3).to(dtype), axis, "max")

    torch._dynamo.reset()
    graph = torch.compile(step, fullgraph=True, backend="aot_eager")
    for rows, dtype in itertools.product((2, 5, 7, 4), (torch.float32, torch.bfloat16)):
        x = torch.arange(9.0 * rows).view(rows, 9)
        for got, want in zip(graph(x.clone(), dtype), step(x.clone(), dtype), strict=True):
            assert torch.equal(got, want)
    return True


@pytest.mark.parametrize("backend", BACKENDS)
def test_dynamo_takes_them_whole(run_on, backend):
    assert all(run_on(compiled, dp=2, backend=backend))
