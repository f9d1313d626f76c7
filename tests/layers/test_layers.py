"""Parallel layers against the plain layer in float64, at degrees that don't divide, and beside another axis.

Item by item the traps that published versions of these layers fell into.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from multicard import partition
from multicard.axis import Axis
from multicard.errors import ConfigError
from multicard.layers import (
    ColumnParallelLinear,
    GatherLastDim,
    ParallelLMHead,
    ParallelRMSNorm,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    shard_of,
)
from multicard.layers.packed import available, pack, pack_tied

DEGREES = [{"tp": 1}, {"tp": 2}, {"tp": 3}, {"tp": 2, "dp": 2}]
SIZES = [(7, 8), (16, 3), (5, 2), (33, 31)]  # (3 and 2 outputs on 3 ranks: a rank with none)


def near(found, expected, tolerance=1e-5):
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * scale)


def linears(mesh):
    """Every split of every size, with and without bias, this rank's results beside one card's."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for n_in, n_out in SIZES:
        for bias in (True, False):
            plain = nn.Linear(n_in, n_out, bias=bias)
            for parameter in plain.parameters():
                parameter.data.normal_(generator=generator)
            x = torch.randn(2, 3, n_in, generator=generator)
            gathered = ColumnParallelLinear.from_linear(plain, mesh.tp, gather_output=True)(x)
            column = ColumnParallelLinear.from_linear(plain, mesh.tp)
            whole_input = RowParallelLinear.from_linear(plain, mesh.tp, input_is_parallel=False)(x)
            row = RowParallelLinear.from_linear(plain, mesh.tp)
            mine = partition.split(n_in, mesh.tp.size)[mesh.tp.rank]
            own_input = row(x[..., mine.start : mine.stop].clone())
            expected = plain.double()(x.double()).detach()
            rows = partition.split(n_out, mesh.tp.size)[mesh.tp.rank]
            found += [
                (gathered, expected),
                (column(x), expected[..., rows.start : rows.stop]),
                (whole_input, expected),
                (own_input, expected),
            ]
            assert not any(p.requires_grad for layer in (column, row) for p in layer.parameters())
    return found


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_linears_equal_one_card(run_on, degrees):
    for found in run_on(linears, **degrees):
        for ours, expected in found:
            near(ours, expected)


def fused(mesh):
    """QKV of 5 heads over 5 groups, gate-up of an odd width; and GQA with a head replicated on ranks that share it."""
    torch.manual_seed(3)
    dim, heads, kv = 4, 6, 2
    parts = [nn.Linear(10, heads * dim), nn.Linear(10, kv * dim), nn.Linear(10, kv * dim)]
    shards = partition.split_heads(heads, kv, mesh.tp.size)
    x = torch.randn(3, 10)
    shares = []
    for shard in shards:
        starts = [(shard.query, 0), (shard.kv, heads), (shard.kv, heads + kv)]
        shares.append([range((s + h.start) * dim, (s + h.stop) * dim) for h, s in starts])
    layer = ColumnParallelLinear.from_linear(parts, mesh.tp, shares=shares)
    gathered = ColumnParallelLinear.from_linear(parts, mesh.tp, shares=shares, gather_output=True)
    q, k, v = (part.double()(x.double()).detach().view(3, -1, dim) for part in parts)
    mine = shards[mesh.tp.rank]
    own = [t[:, h.start : h.stop] for t, h in ((q, mine.query), (k, mine.kv), (v, mine.kv))]
    return layer(x), torch.cat(own, 1).flatten(1), gathered(x), torch.cat([q, k, v], 1).flatten(1)


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_fused_projections_with_replicated_heads(run_on, tp):
    for ours, expected, gathered, whole in run_on(fused, tp=tp):
        near(ours, expected)
        near(gathered, whole)


def vocabulary(mesh):
    torch.manual_seed(4)
    table, head = nn.Embedding(1003, 6), nn.Linear(6, 1003, bias=False)
    ids = torch.tensor([[0, 1002, 500], [334, 335, 669]])
    vectors = VocabParallelEmbedding.from_embedding(table, mesh.tp)(ids)
    logits = ParallelLMHead.from_linear(head, mesh.tp, gather_output=True)(vectors)
    errors = []
    for wrong in (-1, 1003, 2**40):
        try:
            VocabParallelEmbedding.from_embedding(table, mesh.tp)(torch.tensor([3, wrong]))
        except ConfigError as error:
            errors.append(str(error))
    return vectors, table(ids).detach(), logits, (table(ids).double() @ head.weight.double().t()).detach(), errors


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_vocabulary_that_does_not_divide(run_on, tp):
    for vectors, expected, logits, whole, errors in run_on(vocabulary, tp=tp):
        assert torch.equal(vectors, expected)
        near(logits, whole)
        assert len(errors) == 3
        assert all("0 to 1002" in error for error in errors)


def fewer_ids_than_ranks(mesh):
    table = nn.Embedding(2, 3)
    torch.manual_seed(0)
    table.weight.data.normal_()
    ids = torch.tensor([1, 0, 1])
    found = VocabParallelEmbedding.from_embedding(table, mesh.tp)(ids)
    return found, table(ids).detach(), GatherLastDim(mesh.tp, 2)(ParallelLMHead(3, 2, mesh.tp)(found) * 0)


def test_a_rank_without_vocabulary(run_on):
    for found, expected, logits in run_on(fewer_ids_than_ranks, tp=3):
        assert torch.equal(found, expected)
        assert logits.shape == (3, 2)


def norms(mesh):
    torch.manual_seed(5)
    x, weight = torch.randn(4, 11) * 3, torch.rand(11) + 0.5
    mine = partition.split(11, mesh.tp.size)[mesh.tp.rank]
    ours = ParallelRMSNorm(11, mesh.tp, 1e-6, weight)(x[:, mine.start : mine.stop])
    whole = nn.RMSNorm(11, eps=1e-6, dtype=torch.float64)
    whole.weight.data.copy_(weight)
    expected = whole(x.double()).detach()
    plain = RMSNorm(11, 1e-6)
    plain.weight.data.copy_(weight)
    return ours, expected[:, mine.start : mine.stop], plain(x), expected


@pytest.mark.parametrize("tp", [1, 3])
def test_norms(run_on, tp):
    for ours, expected, plain, whole in run_on(norms, tp=tp):
        near(ours, expected)
        near(plain, whole)


def half_sums(mesh):
    """Partial results that a running sum in bfloat16 would lose: 256 and then ones."""
    layer = RowParallelLinear(3, 1, mesh.tp, bias=False, dtype=torch.bfloat16)
    layer.weight.data.fill_(1)
    x = torch.tensor([[256.0, 1.0, 1.0]], dtype=torch.bfloat16)
    return layer(x[:, mesh.tp.rank : mesh.tp.rank + 1])


@pytest.mark.parametrize("backend", ["auto", "gloo"])
def test_half_types_are_added_in_float32(run_on, backend):
    for found in run_on(half_sums, tp=3, backend=backend):
        assert found.item() == 258  # in bfloat16, 256 + 1 is 256 again


def whole_world(mesh):
    plain = nn.Linear(8, 4)
    torch.manual_seed(mesh.dp.rank)
    for parameter in plain.parameters():
        parameter.data.normal_()
    x = torch.randn(2, 8)
    found = RowParallelLinear.from_linear(plain, mesh.tp, input_is_parallel=False)(x)
    return found, plain.double()(x.double()).detach()


def test_ranks_of_another_axis_have_no_part_in_the_sum(run_on):
    for found, expected in run_on(whole_world, tp=2, dp=2):
        near(found, expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 7), st.data())
def test_shards_of_all_ranks_make_the_whole(rows, columns, ranks, data):
    """For any split along either dimension: what ranks take, put in place by their spans, is the tensor."""
    dim = data.draw(st.integers(0, 1))
    shape = (rows, columns) if dim == 0 else (columns, rows)
    whole, rebuilt = torch.randn(shape), torch.zeros(shape)
    for rank in range(ranks):
        axis = Axis("tp", rank, ranks)
        layer = (
            ColumnParallelLinear(columns, rows, axis, device="meta")
            if dim == 0
            else RowParallelLinear(rows, columns, axis, device="meta")
        )
        shard, at = shard_of(layer.weight), 0
        taken = shard.take(whole)
        assert taken.shape == layer.weight.shape == shard.local_shape
        for span in shard.spans:
            rebuilt.narrow(dim, span.start, len(span)).add_(taken.narrow(dim, at, len(span)))
            at += len(span)
    assert torch.equal(rebuilt, whole)


def test_shares_that_cannot_be_meant_are_refused():
    axis = Axis("tp", 0, 2)
    with pytest.raises(ConfigError, match=r"outside range\(4\)"):
        ColumnParallelLinear(3, 4, axis, shares=[[range(0, 2)], [range(2, 5)]])
    with pytest.raises(ConfigError, match="1 shares for the 2 ranks of axis 'tp'"):
        ColumnParallelLinear(3, 4, axis, shares=[[range(0, 4)]])
    with pytest.raises(ConfigError, match="exactly one rank"):
        RowParallelLinear(4, 3, axis, shares=[[range(0, 3)], [range(2, 4)]])  # a row counted twice
    with pytest.raises(ConfigError, match="exactly one rank"):
        RowParallelLinear(4, 3, axis, shares=[[range(0, 2)], [range(3, 4)]])  # a row left out
    with pytest.raises(ConfigError, match="ranks hold 3"):
        ColumnParallelLinear(3, 4, axis, gather_output=True, shares=[[range(0, 2)], [range(3, 4)]])
    with pytest.raises(ConfigError, match="max_norm=1"):
        VocabParallelEmbedding.from_embedding(torch.nn.Embedding(4, 2, max_norm=1.0), axis)
    with pytest.raises(ConfigError, match="no bias"):
        ParallelLMHead.from_linear(nn.Linear(2, 3), axis)
    with pytest.raises(ConfigError, match="with and without"):
        ColumnParallelLinear.from_linear([nn.Linear(2, 3), nn.Linear(2, 3, bias=False)], axis)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep_weight", [False, True])
def test_a_reordered_weight_multiplies_the_same(dtype, keep_weight):
    torch.manual_seed(6)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for n_in, n_out in ((7, 9), (64, 96), (33, 130)):
        plain = nn.Linear(n_in, n_out).to(dtype)
        layer = ColumnParallelLinear.from_linear(plain, Axis("tp", 0, 1))
        assert pack(layer, keep_weight) is (not keep_weight and available(dtype))
        assert not pack(layer, keep_weight)  # once is enough
        for x in (torch.randn(1, 1, n_in, dtype=dtype), torch.randn(2, 17, n_in, dtype=dtype)):
            near(layer(x), x.double() @ plain.weight.double().t() + plain.bias.double(), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1003, 48), (64, 57), (5, 3), (700, 576)])
def test_an_embedding_reads_its_rows_out_of_the_heads_blocks(dtype, rows, columns):
    torch.manual_seed(8)
    table = nn.Embedding(rows, columns).to(dtype)
    axis = Axis("tp", 0, 1)
    embedding = VocabParallelEmbedding.from_embedding(table, axis)
    head = ParallelLMHead(columns, rows, axis, weight=embedding.weight)
    ids, x = torch.randint(rows, (2, 7)), torch.randn(1, 3, columns, dtype=dtype)
    pack_tied(embedding, head)
    assert head.weight is embedding.weight
    assert torch.equal(embedding(ids), table(ids))
    near(head(x), x.double() @ table.weight.double().t(), 1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_tied_blocks_that_are_not_as_expected_stay_in_rows(monkeypatch):
    monkeypatch.setattr("multicard.layers.packed._blocks", lambda packed, weight: None)
    table = nn.Embedding(100, 8)
    axis = Axis("tp", 0, 1)
    embedding = VocabParallelEmbedding.from_embedding(table, axis)
    head = ParallelLMHead(8, 100, axis, weight=embedding.weight)
    assert not pack_tied(embedding, head)
    assert torch.equal(embedding(torch.arange(100)), table.weight)
    near(head(torch.eye(8)), table.weight.double().t())
