"""The schedule follows from sizes alone, and says why."""

import itertools

import pytest
from threads import meshes

import multicard as mc
from multicard.attention import choose_schedule


def chosen(degrees, **sizes):
    config = mc.ParallelConfig(**degrees)
    every = {choose_schedule(mesh, **{"heads": 8, "kv_heads": 8, "seq_len": 4096} | sizes) for mesh in meshes(config)}
    assert len(every) == 1, "the same on every rank"
    return every.pop()


@pytest.mark.parametrize(
    ("degrees", "sizes", "name", "why"),
    [
        ({}, {}, "local", "one rank"),
        ({"ulysses": 4}, {}, "ulysses", "own axes"),
        ({"ring": 4}, {}, "ring", "own axes"),
        ({"ring": 2, "ulysses": 2}, {}, "hybrid", "own axes"),
        ({"ulysses": 4}, {"heads": 2, "kv_heads": 2}, "ring", "ulysses, the mesh's own, 2.00"),
        ({"ulysses": 4}, {"heads": 6, "kv_heads": 2}, "ring", "1.33"),
        ({"ring": 2, "ulysses": 2}, {"heads": 1, "kv_heads": 1}, "ring", "hybrid, the mesh's own, 2.00"),
        ({"ring": 4}, {"causal": True}, "ulysses", "ring, the mesh's own, 1.75"),
        ({"ring": 4}, {"causal": True, "order": "zigzag"}, "ring", "own axes"),
        ({"ring": 4}, {"seq_len": 2}, "ulysses", "2.00"),
        ({"ulysses": 4}, {"masked": True}, "ring", "a mask's rows stay"),
        ({"ulysses": 4}, {"replicated_kv": True}, "local", "holds all keys"),
        ({"ulysses": 4}, {"schedule": "ring"}, "ring", "asked for"),
    ],
)
def test_choice(degrees, sizes, name, why):
    schedule = chosen(degrees, **sizes)
    assert schedule.name == name
    assert why in schedule.why


def test_auto_is_never_much_worse_than_any_other():
    """Against the work that each schedule's slowest rank really has, counted score by score."""
    from multicard import partition
    from multicard.attention.schedule import Schedule

    for ranks, heads, seq_len, causal in itertools.product((2, 4), (1, 3, 8), (1, 7, 16), (False, True)):
        mesh = meshes(mc.ParallelConfig(ring=ranks))[0]
        slices = partition.split_sequence(seq_len, ranks)
        rows = [sum((p + 1) if causal else seq_len for span in spans for p in span) for spans in slices]
        most = {
            "ring": heads * max(rows),
            "ulysses": max(map(len, partition.split(heads, ranks))) * sum(rows),
        }
        schedule = choose_schedule(mesh, heads=heads, kv_heads=heads, seq_len=seq_len, causal=causal)
        assert isinstance(schedule, Schedule)
        assert most[schedule.name] * 0.95 <= min(most.values()), (ranks, heads, seq_len, causal)


def test_auto_really_leaves_idle_heads_behind(run_on):
    """Two heads on four Ulysses ranks: every rank computes all the same."""
    import torch

    def scores_computed(mesh):
        from multicard.attention import attend, rotation

        seen = []
        compute = rotation.block_attention

        def counting(q, k, v, **options):
            seen.append(q.shape[1] * q.shape[2] * k.shape[1])
            return compute(q, k, v, **options)

        rotation.block_attention = counting
        try:
            x = torch.randn(1, 4, 2, 8)
            attend(x, x, x, mesh=mesh)
        finally:
            rotation.block_attention = compute
        return sum(seen)

    assert run_on(scores_computed, ulysses=4) == [4 * 2 * 16] * 4
