"""Causality on integers: the pieces cover exactly what is seen, and nothing else."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multicard import partition
from multicard.attention.visibility import Visibility, runs, staircase


@st.composite
def rising_spans(draw):
    bounds = sorted(draw(st.lists(st.integers(-5, 40), max_size=8, unique=True)))
    return tuple(range(a, b) for a, b in zip(bounds[::2], bounds[1::2], strict=False))


def seen(pieces, rows, keys):
    """How often each score is computed."""
    count = torch.zeros(rows, keys, dtype=torch.int)
    for piece in pieces:
        block = torch.ones(len(piece.rows), len(piece.keys), dtype=torch.int)
        count[piece.rows.start : piece.rows.stop, piece.keys.start : piece.keys.stop] += (
            block.tril() if piece.causal else block
        )
    return count


def positions(spans):
    return torch.tensor([p for span in spans for p in span], dtype=torch.long)


@given(rising_spans(), rising_spans())
def test_pieces_cover_what_is_seen_once(q_spans, k_spans):
    pieces = staircase(q_spans, k_spans)
    q, k = positions(q_spans), positions(k_spans)
    assert torch.equal(seen(pieces, len(q), len(k)), (k <= q[:, None]).int())
    assert all(piece.rows and piece.keys for piece in pieces)
    assert all(len(piece.rows) == len(piece.keys) for piece in pieces if piece.causal)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("order", partition.ORDERS)
def test_default_orders_need_one_call_a_block(ranks, order):
    """Aligned lengths: the rank's own block is one causal square, the others one rectangle or nothing."""
    slices = partition.split_sequence(ranks * 8, ranks, order)
    for mine, other in itertools.product(slices, repeat=2):
        assert len(staircase(mine, other)) <= 1


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_zigzag_balances_the_work(ranks):
    slices = partition.split_sequence(ranks * 8, ranks, "zigzag")
    for step in range(ranks):
        work = {
            sum(seen(staircase(slices[r], slices[(r - step) % ranks]), 8, 8).sum() for _ in (0,)).item()
            for r in range(ranks)
        }
        assert len(work) == 1 or step == 0, "every rank does the same at every step"


@given(rising_spans())
def test_runs_find_the_spans_again(spans):
    found = runs(positions(spans))
    assert found is not None
    assert torch.equal(positions(found), positions(spans))


def test_positions_that_do_not_rise_have_no_runs():
    assert runs(torch.tensor([3, 4, 1, 2])) is None
    assert runs(torch.tensor([3, 3, 4])) is None
    assert runs(torch.arange(0, 200, 2)) is None
    assert runs(torch.tensor([], dtype=torch.long)) == ()


def test_blocks_that_a_mask_empties_are_skipped():
    key_mask = torch.tensor([[True, False, False, False], [False, False, False, False]])
    visible = Visibility(blocks=((range(2),), (range(2, 4),)), key_mask=key_mask)
    assert len(visible.pieces(0, 3)) == 1
    assert visible.pieces(1, 3) == []
    mask = torch.full((1, 1, 3, 4), -torch.inf)
    mask[..., 3] = 0
    visible = Visibility(blocks=((range(2),), (range(2, 4),)), mask=mask)
    assert visible.pieces(0, 3) == []
    assert len(visible.pieces(1, 3)) == 1


def test_blocks_above_the_diagonal_are_skipped():
    visible = Visibility(blocks=((range(4),), (range(4, 8),)), causal=True, q_positions=(range(4),))
    assert len(visible.pieces(0, 4)) == 1
    assert visible.pieces(1, 4) == []
