"""A ring's memory doesn't grow with the number of ranks: allocations counted, beside gathering all keys."""

import gc

import torch

from multicard import attention

ROWS, HEADS, DIM, RANKS = 2048, 1, 64, 4  # 8192 positions on four ranks
BLOCK = ROWS * HEADS * DIM * 4


def peak_of(call) -> int:
    """Bytes held at most during ``call``, above those held before it, from the profiler's allocation records.

    The least of four runs after one: that may allocate what is kept, such as a channel between two ranks, and what a
    neighbour sends that is a step ahead is held beside until its receive is posted.
    """
    call()
    return min(_peak_of_one(call) for _ in range(4))


def _peak_of_one(call) -> int:
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def gathering(q, k, v, mesh):
    """The variant that calls itself a ring elsewhere: all keys and values on every rank."""
    k, v = (attention.gather_sequence(x, mesh, ROWS * mesh.sequence.size) for x in (k, v))
    return attention.attend(q, k, v, mesh=mesh, replicated_kv=True)


def peaks(mesh):
    q, k, v = (torch.randn(1, ROWS, HEADS, DIM) for _ in range(3))
    with torch.no_grad():
        kernel = peak_of(lambda: attention.attention_forward(q, k, v)) - BLOCK  # without its output
        ring = peak_of(lambda: attention.attend(q, k, v, mesh=mesh))
        gathered = peak_of(lambda: gathering(q, k, v, mesh))
    return kernel, ring, gathered


def test_peak_memory_of_a_ring(run_on):
    for kernel, ring, gathered in run_on(peaks, ring=RANKS):
        out = accumulator = partial = BLOCK
        two_blocks = 2 * 2 * BLOCK
        log_sum_exps = 4 * ROWS * HEADS * 4  # of the accumulator, the partial output, and between them
        early = 2 * BLOCK  # at most: where a neighbour was ahead in all four runs
        assert ring <= out + accumulator + partial + two_blocks + kernel + log_sum_exps + early
        assert ring >= two_blocks, "counted at all"
        assert gathered >= 2 * RANKS * BLOCK
        assert ring < gathered
