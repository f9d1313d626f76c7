"""Random cells against float64 attention on one card: on real ranks by hundreds, on threads with shrinking."""

import random

import pytest
import torch
from cells import Cell, assert_exact, attend_on, check, inputs, mesh_sizes, oracle, random_cell, solved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from threads import run_threads

import multicard as mc


@pytest.mark.parametrize("config", [c for n in (2, 3, 4) for c in mesh_sizes(n)], ids=str)
def test_random_cells_on_real_ranks(run_on, config):
    rng = random.Random(f"{config}")
    cells = [random_cell(rng, config.world_size) for _ in range(120)]
    assert_exact(run_on(check, cells, ring=config.ring, ulysses=config.ulysses), cells)


def on_threads(cells, **degrees):
    assert_exact(run_threads(check, cells, [solved(cell) for cell in cells], **degrees), cells)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 8).flatmap(lambda n: st.sampled_from(mesh_sizes(n))), st.integers(0, 1 << 30))
def test_random_cells_on_up_to_eight_threads(config, seed):
    rng = random.Random(seed)
    cells = [random_cell(rng, config.world_size) for _ in range(4)]
    on_threads(cells, ring=config.ring, ulysses=config.ulysses)


PEERS_BUGS = {
    "a mask misaligned when a middle rank is short": [
        (ranks, Cell(seq_len=seq_len, heads=ranks, kv_heads=ranks, batch=2, mask=mask, key_mask=key_mask))
        for ranks, lengths in ((4, (9, 10)), (8, (13,)))
        for seq_len in lengths
        for mask, key_mask in ((None, "padding"), ("bool b1", None), ("float 1h", "random"))
    ],
    "zero-padded tokens attended to": [
        (ranks, Cell(seq_len=seq_len, heads=8, kv_heads=8, causal=causal))
        for ranks, seq_len in ((4, 5), (4, 3), (8, 13), (3, 7))
        for causal in (False, True)
    ],
    "text tokens counted once a ring step": [
        (ranks, Cell(seq_len=12, heads=4, kv_heads=4, joint=7, joint_masked=masked))
        for ranks in (2, 4)
        for masked in (False, True)
    ],
    "grouped queries read by the wrong heads": [
        (ranks, Cell(heads=heads, kv_heads=kv_heads))
        for ranks in (2, 4, 8)
        for heads, kv_heads in ((9, 3), (6, 2), (15, 3), (5, 1))
    ],
}


@pytest.mark.parametrize("bug", PEERS_BUGS)
@pytest.mark.parametrize("schedule", ["ulysses", "ring"])
def test_bugs_seen_in_peers(bug, schedule):
    for ranks, cell in PEERS_BUGS[bug]:
        on_threads([cell], **{schedule: ranks})


def test_the_same_cell_gives_the_same_slice_on_any_mesh(run_on):
    cell = Cell(seq_len=24, heads=4, kv_heads=2, causal=True, order="zigzag", key_mask="random", batch=2)
    whole = inputs(cell)
    wanted = oracle(cell, whole)[0]

    def gathered(mesh):
        return mc.gather_sequence(attend_on(mesh, cell, whole)[0], mesh, cell.seq_len, order="zigzag")

    for degrees in ({"ring": 4}, {"ulysses": 4}, {"ring": 2, "ulysses": 2}):
        for out in run_on(gathered, **degrees):
            torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=0)


def test_attention_inside_a_larger_mesh(run_on):
    """Axes that attention doesn't use split the batch or the heads; each part gets its own answer."""
    whole = {part: inputs(Cell(seed=part, seq_len=11)) for part in range(2)}

    def error(mesh):
        part = mesh.tp.rank if mesh.tp.size > 1 else mesh.cfg.rank
        out, _ = attend_on(mesh, Cell(seed=part, seq_len=11), whole[part])
        wanted = mc.shard_sequence(oracle(Cell(seed=part, seq_len=11), whole[part])[0], mesh)
        return (out - wanted).abs().max().item()

    for degrees in ({"ring": 2, "tp": 2}, {"cfg": 2, "ulysses": 2}):
        assert max(run_on(error, **degrees)) < 1e-5
