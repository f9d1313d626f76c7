"""Slices and the whole again."""

import itertools

import pytest
import torch
from threads import run_threads

import multicard as mc
from multicard import partition


def round_trip(mesh):
    for seq_len, order, dim in itertools.product((0, 1, 3, 8, 13), partition.ORDERS, (0, 1, 2)):
        shape = [2, 3, 4]
        shape[dim] = seq_len
        whole = torch.arange(float(torch.tensor(shape).prod())).view(shape)
        mine = mc.shard_sequence(whole, mesh, dim, order)
        assert mine.shape[dim] == partition.sequence_sizes(seq_len, mesh.sequence.size, order)[mesh.sequence.rank]
        assert torch.equal(mc.gather_sequence(mine, mesh, seq_len, dim, order), whole)
    return True


def test_round_trip_on_real_ranks(run_on):
    for degrees in ({"ring": 2}, {"ulysses": 3}, {"ring": 2, "ulysses": 2}):
        assert all(run_on(round_trip, **degrees))


def test_round_trip_on_threads():
    for ranks in (1, 5, 8):
        assert all(run_threads(round_trip, ring=ranks))


def test_slices_are_those_of_the_design():
    def slices(order):
        def mine(mesh):
            return mc.shard_sequence(torch.arange(10), mesh, 0, order).tolist()

        return run_threads(mine, ring=2, ulysses=2)

    assert slices("contiguous") == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]
    assert slices("zigzag") == [[0, 1, 9], [2, 3, 8], [4, 7], [5, 6]]


def test_what_does_not_fit_is_refused(run_on):
    with pytest.raises(mc.errors.ConfigError, match="order='diagonal'"):
        mc.shard_sequence(torch.zeros(1, 4), mc.single(), order="diagonal")

    def message(mesh):
        try:
            mc.gather_sequence(torch.zeros(1, 4), mesh, 5)
        except mc.errors.ConfigError as error:
            return str(error)

    assert all("pass every rank's length" in text for text in run_on(message, ring=2))
