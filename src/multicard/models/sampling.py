"""Choosing the next token while every rank holds a slice of the logits.

The whole logits are never gathered. Ranks exchange candidates once, as (score, id) pairs, and all pick from the same
candidates, so they can't disagree. Ties go to the lowest id.

Sampling is Gumbel-max (Maddison et al. 2014, arXiv 1411.0030): the largest of ``logit/temperature + noise`` is a sample
of the softmax. The noise of a token is a hash of (seed, prompt, step, token), so each rank draws the noise of its own
slice, and it is the same at every degree.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from multicard import collectives
from multicard.axis import Axis
from multicard.errors import ConfigError, MulticardError
from multicard.values import is_whole

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
BITS = 31  # steps that bisect float32 numbers of one sign; asking whether all rows are done would wait for the device
NOT_FINITE = -1  # in a token's place
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        temperature: 0 takes the likeliest token; otherwise logits are divided by it.
        top_k: only the k likeliest.
        top_p: only the likeliest whose probabilities add up to p, after top_k (arXiv 1904.09751). Tokens exactly as
            likely as the last of them are kept too.
        seed: any whole number.

    Raises:
        ConfigError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.temperature, int | float) and 0 <= self.temperature < math.inf):
            raise ConfigError(f"temperature={self.temperature!r}: 0 (greedy) or more")
        if self.top_k is not None and not is_whole(self.top_k, least=1):
            raise ConfigError(f"top_k={self.top_k!r}: a whole number of 1 or more, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p!r}: more than 0 and at most 1, or None for all tokens")
        if not is_whole(self.seed):
            raise ConfigError(f"seed={self.seed!r}: a whole number")


def choose(
    logits: Tensor, axis: Axis, vocabulary: range, sampling: Sampling, noise: Sequence[tuple[int, int]]
) -> Tensor:
    """The next token of every row, the same on every rank.

    One all-gather of (score, id) pairs; with top_p and no top_k about thirty of one number a row before it.

    Args:
        logits: ``(rows, this rank's vocabulary)``.
        vocabulary: the ids that this rank holds.
        noise: what every row's is keyed by: the number of its prompt among the caller's, and of this new token, from 0.

    Returns:
        ``(rows,)`` int64, NOT_FINITE where logits aren't numbers: see :func:`read`. Nothing is read from the device.
    """
    if sampling.temperature == 0:
        return _winner(*_exchange(*_best(logits.float(), vocabulary), axis))
    ids = torch.arange(vocabulary.start, vocabulary.stop, device=logits.device)
    scores = logits.double() / sampling.temperature
    keys = [noise_key(sampling.seed, prompt, step) for prompt, step in noise]
    if sampling.top_k is not None:
        return _choose_of_top_k(scores, ids, axis, sampling, keys)
    if sampling.top_p is not None and sampling.top_p < 1:
        scores = scores.masked_fill(~nucleus(scores, axis, sampling.top_p), -math.inf)
    return _winner(*_exchange(*_best(scores + gumbel(keys, ids), vocabulary), axis))


def read(tokens: Tensor) -> list[int]:
    """The chosen tokens on the host. The only read of a step: it waits for the device.

    Raises:
        MulticardError: logits that aren't numbers.
    """
    return finite(tokens.tolist())


def finite(tokens: list[int], whose: str = "model") -> list[int]:
    """The tokens, if all were chosen from numbers. Raises as :func:`read`, about the model that ``whose`` names."""
    if NOT_FINITE in tokens:
        raise MulticardError(f"the {whose}'s logits aren't finite numbers: damaged weights, or try dtype='float32'")
    return tokens


def _choose_of_top_k(scores: Tensor, ids: Tensor, axis: Axis, sampling: Sampling, keys: list[int]) -> Tensor:
    assert sampling.top_k is not None
    local = scores.sort(dim=-1, descending=True, stable=True)
    k = min(sampling.top_k, scores.shape[1])
    scores, found = _exchange(local.values[:, :k], ids[local.indices[:, :k]], axis, width=sampling.top_k)
    merged = scores.sort(dim=-1, descending=True, stable=True)  # ranks' slices ascend, so ties keep the order of ids
    scores, found = merged.values[:, : sampling.top_k], found.gather(1, merged.indices)[:, : sampling.top_k]
    if sampling.top_p is not None:
        shares = scores.softmax(-1)
        before = shares.cumsum(-1) - shares
        last = ((before < sampling.top_p).sum(-1, keepdim=True) - 1).clamp(min=0)
        scores = scores.masked_fill(scores < scores.gather(1, last), -math.inf)
    return _winner(scores + gumbel(keys, found), found)


def nucleus(scores: Tensor, axis: Axis, p: float) -> Tensor:
    """Which tokens are among the likeliest with probability p in total: bool, like ``scores``.

    They are the tokens with a score of t or more, for the largest t at which these have at least probability p on all
    ranks together. t is found by bisection: each rank computes its own tokens' probability, and the ranks' are added up
    in rank order, so all find the same t.

    Args:
        scores: ``(batch, this rank's vocabulary)`` float64.
    """
    batch = scores.shape[0]
    best, _ = _best(scores, range(scores.shape[1]))
    top = collectives.all_gather(best, axis, dim=1).amax(1, keepdim=True)
    below = scores - top
    ordered = below.sort(dim=-1).values
    masses = torch.cat([ordered.exp().flip(-1).cumsum(-1).flip(-1), ordered.new_zeros(batch, 1)], dim=1)
    wanted = p * _gather_columns(masses[:, 0], axis).sum(1)
    # Bisect float32 numbers from the top down by their bits, which for negative floats ascend as they fall.
    low, high = _bits(ordered.new_zeros(batch)), _bits(ordered.new_full((batch,), -math.inf))
    for _ in range(BITS):
        middle = (low + high) // 2
        at = torch.searchsorted(ordered, _from_bits(middle)[:, None])
        enough = _gather_columns(masses.gather(1, at)[:, 0], axis).sum(1) >= wanted
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    return below >= _from_bits(low)[:, None]


def gumbel(keys: Sequence[int], ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, for token ``ids`` ``(n,)`` or ``(batch, n)`` under each row's key."""
    key = torch.tensor([_signed(k) for k in keys], device=ids.device)[:, None]
    bits = _mix(key + (ids + 1) * _signed(GOLDEN))
    uniform = (_shift(bits, 11).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def noise_key(seed: int, prompt: int, step: int) -> int:
    """SplitMix64 (Steele et al. 2014) of the three in turn."""
    key = 0
    for part in (seed, prompt, step):
        key = (key ^ (part & MASK)) + GOLDEN & MASK
        for shift, factor in MIX:
            key = (key ^ key >> shift) * factor & MASK
        key ^= key >> 31
    return key


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, which wraps as uint64 does."""
    for shift, factor in MIX:
        x = (x ^ _shift(x, shift)) * _signed(factor)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _bits(x: Tensor) -> Tensor:
    return (x.float().view(torch.int32) & 0x7FFFFFFF).long()


def _from_bits(x: Tensor) -> Tensor:
    return -x.int().view(torch.float32).double()


def _best(scores: Tensor, vocabulary: range) -> tuple[Tensor, Tensor]:
    """The largest score of each row and its id, ``(batch, 1)`` each; of equal scores the lowest id."""
    if not vocabulary:
        none = scores.new_full((scores.shape[0], 1), -math.inf)
        return none, none.new_zeros(none.shape, dtype=torch.int64)
    best, index = scores.max(dim=-1, keepdim=True)
    return best, index + vocabulary.start


def _exchange(scores: Tensor, ids: Tensor, axis: Axis, width: int = 1) -> tuple[Tensor, Tensor]:
    """Every rank's ``(batch, at most width)`` candidates side by side, in rank order. One all-gather."""
    if axis.size == 1:
        return scores.double(), ids
    pairs = scores.new_full((2, scores.shape[0], width), -math.inf, dtype=torch.float64)
    pairs[0, :, : scores.shape[1]] = scores
    pairs[1, :, : ids.shape[1]] = ids.double()
    scores, found = collectives.all_gather(pairs, axis, dim=-1).unbind(0)
    return scores, found.long()


def _gather_columns(x: Tensor, axis: Axis) -> Tensor:
    return collectives.all_gather(x[:, None], axis, dim=1)


def _winner(scores: Tensor, ids: Tensor) -> Tensor:
    best, index = scores.max(dim=-1, keepdim=True)
    return torch.where(best.isfinite(), ids.gather(1, index), NOT_FINITE)[:, 0]
