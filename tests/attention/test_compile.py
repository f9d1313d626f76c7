"""torch.compile around attend: one graph on every mesh, compiled once for all lengths."""

import dataclasses

import pytest
import torch
from cells import Cell, attend_on, inputs

from multicard import attention


def compiled_is_eager(mesh, cells):
    """On a rank, for every cell: whether the call compiled into one graph gives the eager one's result."""
    found = []
    for cell in cells:
        whole = inputs(cell)

        def block(scale, cell=cell, whole=whole):  # attention between other operations
            outs = attend_on(mesh, cell, whole)
            return [torch.nn.functional.gelu(out * scale) + 1 for out in outs if out is not None]

        torch._dynamo.reset()
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            pairs = zip(compiled(torch.tensor(2.0)), block(torch.tensor(2.0)), strict=True)
            near = 1e-2 if cell.dtype == torch.bfloat16 else 1e-6  # a gelu of other strides is rounded otherwise
            found.append(all(torch.allclose(*pair, rtol=near, atol=near) for pair in pairs))
    return found


BASE = Cell(seq_len=13, heads=6, kv_heads=2, batch=2, key_mask="random")
CELLS = [
    BASE,
    dataclasses.replace(BASE, seq_len=24, layout="BNSD", value_dim=5),
    dataclasses.replace(BASE, causal=True, order="zigzag", dtype=torch.bfloat16),
    dataclasses.replace(BASE, causal=True, positions="shuffled"),
    dataclasses.replace(BASE, joint=3, joint_masked=True, layout="BNSD"),
    dataclasses.replace(BASE, mask="float b1", strided=True),
    dataclasses.replace(BASE, key_mask="none left", scale=0.3),
    dataclasses.replace(BASE, kv_seq_len=7, replicated_kv=True),
]


@pytest.mark.parametrize(
    "degrees",
    [{}, {"ulysses": 2}, {"ring": 2}, {"ring": 3}, {"ring": 2, "ulysses": 2}, {"ring": 2, "backend": "gloo"}],
    ids=str,
)
def test_one_graph(run_on, degrees):
    for found in run_on(compiled_is_eager, CELLS, **degrees):
        assert found == [True] * len(CELLS)


LENGTHS = [9, 8, 13, 14, 21, 30, 11, 10, 17]


def lengths_in_two_graphs(mesh):
    """Whether every length gives the eager result, and how many graphs were compiled for all of them."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()

    def block(q, k, seq_len):
        return attention.attend(q * 2, k, k, mesh=mesh, causal=True, seq_len=seq_len) + 1

    compiled, same = torch.compile(block, backend="aot_eager", fullgraph=True), []
    with torch.no_grad():
        for length in LENGTHS:
            q, k = (attention.shard_sequence(torch.randn(1, length, heads, 8), mesh) for heads in (4, 2))
            same.append(torch.equal(compiled(q, k, length), block(q, k, length)))
    return same, counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("degrees", [{}, {"ulysses": 2}, {"ring": 3}, {"ring": 2, "ulysses": 2}], ids=str)
def test_any_number_of_lengths(run_on, degrees):
    for same, graphs in run_on(lengths_in_two_graphs, **degrees):
        assert same == [True] * len(LENGTHS)
        assert graphs <= 3, "one for the first length, others once seq_len and once this rank's rows have varied"


def test_decode_is_one_graph(run_on):
    def decoded(mesh):
        torch._dynamo.reset()
        q, k = torch.ones(1, 1, 4, 8), torch.randn(1, 5 + mesh.rank, 2, 8)

        def step(q):
            return attention.attend_decode(q, k, k, axis=mesh.sequence) * 2

        with torch.no_grad():
            return torch.allclose(torch.compile(step, backend="aot_eager", fullgraph=True)(q), step(q), atol=1e-6)

    assert all(run_on(decoded, ring=2))


def test_bad_arguments_are_refused_as_without_it(run_on):
    def refusal(mesh):
        torch._dynamo.reset()
        x = torch.ones(1, 3, 4, 8)
        call = torch.compile(lambda x: attention.attend(x, x, x, mesh=mesh, seq_len=9), backend="aot_eager")
        with torch.no_grad(), pytest.raises(attention.checks.ConfigError, match="seq_len=9"):
            call(x)
        return True

    assert all(run_on(refusal, ulysses=2))
