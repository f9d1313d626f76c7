"""Sampling from slices of the logits against the plain thing on one card."""

import math

import pytest
import torch

from multicard import partition
from multicard.errors import ConfigError, MulticardError
from multicard.models.sampling import Sampling, choose, gumbel, noise_key, read

VOCABULARY = 1003
ONE = [
    Sampling(),
    Sampling(temperature=0.7, seed=3),
    Sampling(temperature=1.3, top_k=5, seed=-1),
    Sampling(temperature=1.0, top_p=0.8, seed=2**70),
    Sampling(temperature=1.0, top_k=40, top_p=0.5),
    Sampling(temperature=1.0, top_k=2000),
    Sampling(temperature=2.0, top_p=1e-9),
]


def logits_with_ties():
    torch.manual_seed(7)
    logits = (torch.randn(4, VOCABULARY) * 2).round(decimals=1)
    logits[1, [3, 999]] = 50.0  # the largest twice, on different ranks
    logits[2] = 0.0  # all the same
    return logits


def reference(logits, sampling, row, step):
    """One card, float64, by sorting."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    scores = logits.double() / sampling.temperature
    order = sorted(range(len(scores)), key=lambda i: (-scores[i].item(), i))[: sampling.top_k]
    if sampling.top_p is not None:
        shares = scores[order].softmax(0)
        before, last = 0.0, 0
        for i, share in enumerate(shares.tolist()):
            if before >= sampling.top_p:
                break
            before, last = before + share, i
        order = [i for i in order if scores[i] >= scores[order[last]]]
    ids = torch.tensor(order)
    noisy = scores[ids] + gumbel([noise_key(sampling.seed, row, step)], ids)[0]
    return int(ids[noisy.argmax()])


def choose_all(mesh, logits):
    vocabulary = partition.split(logits.shape[1], mesh.tp.size)[mesh.tp.rank]
    local = logits[:, vocabulary.start : vocabulary.stop]
    return [[choose(local, mesh.tp, vocabulary, s, noise(step)).tolist() for step in range(3)] for s in ONE]


def noise(step):
    return [(row, step) for row in (5, 6, 7, 8)]


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_equal_to_sorting_on_one_card_at_every_degree(run_on, tp):
    logits = logits_with_ties()
    expected = [[[reference(row, s, 5 + i, step) for i, row in enumerate(logits)] for step in range(3)] for s in ONE]
    for found in run_on(choose_all, logits, tp=tp):
        assert found == expected


def choose_in_one_exchange(mesh, logits, noise):
    vocabulary = partition.split(logits.shape[1], mesh.tp.size)[mesh.tp.rank]
    local = logits[:, vocabulary.start : vocabulary.stop]
    return [choose(local, mesh.tp, vocabulary, sampling, noise).tolist() for sampling in ONE]


@pytest.mark.parametrize("tp", [1, 3])
def test_rows_of_several_steps(run_on, tp):
    logits = logits_with_ties()[[0, 0, 0, 3]]
    noise = [(5, 2), (5, 3), (5, 4), (6, 0)]
    expected = [[reference(row, s, *key) for row, key in zip(logits, noise, strict=True)] for s in ONE]
    assert any(len(set(tokens[:3])) > 1 for tokens in expected), "the same logits, and other noise"
    assert run_on(choose_in_one_exchange, logits, noise, tp=tp) == [expected] * tp


def test_ranks_without_vocabulary(run_on):
    logits = torch.tensor([[0.0, 1.0]] * 4)
    found = run_on(choose_all, logits, tp=4)
    assert found.count(found[0]) == 4
    assert found[0][0] == [[1] * 4] * 3


def test_samples_follow_the_softmax():
    """Pearson's chi-squared over 20 000 steps; 0.999 of fair draws stay under the bound."""
    torch.manual_seed(0)
    logits = torch.randn(1, 8)
    counts = torch.zeros(8, dtype=torch.float64)
    ids = torch.arange(8)
    for step in range(20_000):
        noisy = logits[0].double() + gumbel([noise_key(11, 0, step)], ids)[0]
        counts[noisy.argmax()] += 1
    expected = logits[0].double().softmax(0) * 20_000
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # 7 degrees of freedom


def test_noise_depends_on_everything_that_it_is_keyed_by():
    ids = torch.arange(100)
    base = gumbel([noise_key(1, 2, 3)], ids)
    others = [gumbel([noise_key(*key)], ids) for key in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2), (3, 2, 1))]
    assert all((base != other).all() for other in others)
    assert base.unique().numel() == 100
    assert torch.equal(gumbel([noise_key(1, 2, 3)], ids[40:60]), base[:, 40:60])  # a slice draws its own part
    assert base.isfinite().all()


def not_finite(mesh):
    vocabulary = partition.split(10, mesh.tp.size)[mesh.tp.rank]
    local = torch.zeros(1, len(vocabulary))
    if mesh.tp.rank == 1:
        local[0, 0] = math.nan
    try:
        read(choose(local, mesh.tp, vocabulary, Sampling(), [(0, 0)]))
    except MulticardError as error:
        return str(error)


def test_logits_that_are_not_numbers_are_an_error_on_every_rank(run_on):
    assert all("aren't finite" in message for message in run_on(not_finite, tp=2))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_k": 1.5},
        {"top_p": 0},
        {"top_p": 1.1},
        {"seed": "x"},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)
