"""torch.compile around attend: one graph, broken only where a ring talks point to point."""

import pytest
import torch
from cells import Cell, attend_on, inputs

from multicard import attention


def breaks(mesh, cells):
    """On a rank, for every cell: whether the compiled call's result is the eager one's, and why its graph breaks."""
    from torch._dynamo.utils import counters

    found = []
    for cell in cells:
        whole = inputs(cell)

        def block(scale, cell=cell, whole=whole):  # attention between other operations
            out, _ = attend_on(mesh, cell, whole)
            return torch.nn.functional.gelu(out * scale) + 1

        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(block, backend="aot_eager")
        with torch.no_grad():
            same = torch.allclose(compiled(torch.tensor(2.0)), block(torch.tensor(2.0)), atol=1e-6)
        reasons = counters["graph_break"]
        found.append((same, sum(reasons.values()), all("point to point" in reason for reason in reasons)))
    return found


BASE = {"seq_len": 13, "heads": 6, "kv_heads": 2, "batch": 2, "key_mask": "random"}
CELLS = [
    Cell(**BASE),
    Cell(**BASE | {"seq_len": 24}),
    Cell(**BASE, causal=True, order="zigzag"),
    Cell(**BASE, joint=3),
    Cell(**BASE, mask="float b1"),
]


NESTED = 5
"""Calls from ``block`` to the ring: Dynamo breaks each caller's frame around the one place that can't be compiled."""


@pytest.mark.parametrize(
    ("degrees", "cells"),
    [({}, CELLS[:1]), ({"ulysses": 2}, CELLS), ({"ring": 2}, CELLS[1:]), ({"ring": 3}, CELLS[:1])],
    ids=["one rank", "ulysses", "ring of 2", "ring of 3"],
)
def test_graph_breaks_only_point_to_point(run_on, degrees, cells):
    cells = [Cell(**{**vars(cell), "schedule": "ring" if "ring" in degrees else "ulysses"}) for cell in cells]
    for found in run_on(breaks, cells, **degrees):
        for cell, (same, count, only_point_to_point) in zip(cells, found, strict=True):
            assert same, cell
            assert only_point_to_point, cell
            assert count == (NESTED if "ring" in degrees else 0), f"{cell}: one place for a whole ring, however long"


def test_other_lengths_are_compiled_again(run_on):
    def called(mesh):
        torch._dynamo.reset()

        def block(q, k):
            return attention.attend(q, k, k, mesh=mesh, causal=True) * 2

        compiled = torch.compile(block, backend="aot_eager")
        with torch.no_grad():
            pairs = [(torch.randn(1, rows, 4, 8), torch.randn(1, rows, 2, 8)) for rows in (4, 7)]
            return all(torch.allclose(compiled(*pair), block(*pair), atol=1e-6) for pair in pairs)

    assert all(run_on(called, ulysses=2))
    assert all(run_on(called, ring=2))


def test_decode_is_one_graph(run_on):
    def decoded(mesh):
        torch._dynamo.reset()
        q, k = torch.randn(1, 1, 4, 8), torch.randn(1, 5 + mesh.rank, 2, 8)
        q = torch.ones_like(q)

        def step(q):
            return attention.attend_decode(q, k, k, axis=mesh.sequence) * 2

        with torch.no_grad():
            return torch.allclose(torch.compile(step, backend="aot_eager", fullgraph=True)(q), step(q), atol=1e-6)

    assert all(run_on(decoded, ring=2))
