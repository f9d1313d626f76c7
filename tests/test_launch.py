"""launch and Ranks: values, closures, kept objects, streams."""

import pytest
import torch

import multicard as mc
from multicard import collectives


def gather_ranks(mesh, base):
    return collectives.all_gather(torch.tensor([base + mesh.rank]), mesh.tp).tolist()


def test_values_by_rank(run_on):
    assert run_on(gather_ranks, 10, tp=2, backend="gloo") == [[10, 11], [10, 11]]


def test_closures_and_meshes(run_on):
    offset = torch.tensor(3.0)

    def fn(mesh, x):
        return (mesh.ring.rank, mesh.tp.rank, float(collectives.all_reduce(x + offset, mesh.sequence)))

    assert run_on(fn, torch.tensor(1.0), ring=2, backend="gloo") == [(0, 0, 8.0), (1, 0, 8.0)]


def test_exception_keeps_its_type(run_on):
    def fn(mesh):
        if mesh.rank == 1:
            raise LookupError("not here")

    with pytest.raises(LookupError, match="not here") as caught:
        run_on(fn, tp=2, backend="gloo")
    assert caught.value.__cause__.rank == 1
    assert run_on(gather_ranks, 0, tp=2, backend="gloo") == [[0, 1]] * 2


def test_keep_and_stream():
    with mc.Ranks(mc.ParallelConfig(tp=2), timeout=10, backend="gloo") as ranks:
        kept = ranks.keep(lambda mesh: {"rank": mesh.rank})
        assert ranks.run(lambda mesh, own: own["rank"], kept) == [0, 1]

        def count(mesh, own, n):
            for i in range(n):
                yield i + own["rank"]

        assert list(ranks.stream(count, kept, 4)) == [0, 1, 2, 3]
        for item in ranks.stream(count, kept, 100):
            if item == 2:
                break
        assert ranks.run(lambda mesh: mesh.rank) == [0, 1]
