"""How many ranks each mesh axis has, and which rank sits where: plain numbers, no torch."""

from __future__ import annotations

import dataclasses
import math

from multicard.errors import ConfigError
from multicard.values import did_you_mean, is_whole

AXES = ("dp", "cfg", "ring", "ulysses", "tp")
"""Mesh axes, outermost first: the axis that communicates most has the closest ranks."""


@dataclasses.dataclass(frozen=True, init=False)
class ParallelConfig:
    """The degree of every mesh axis.

    ``rank = (((dp·CFG + cfg)·RING + ring)·ULYSSES + ulysses)·TP + tp``. TP is innermost because it communicates twice
    a layer and so needs the fastest links; data parallel is outermost because it never communicates within a request.

    Args:
        dp: replicas of everything below, each serving its own requests.
        cfg: branches of classifier-free guidance.
        ring: sequence parallel by sending keys and values around a ring (arXiv 2310.01889).
        ulysses: sequence parallel by exchanging a shard of the sequence for a shard of the heads (arXiv 2309.14509).
        tp: tensor parallel (arXiv 1909.08053).

    Raises:
        ConfigError: a degree that is not a positive integer, or an axis that does not exist.
    """

    dp: int = 1
    cfg: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1

    def __init__(self, *, dp: int = 1, cfg: int = 1, ring: int = 1, ulysses: int = 1, tp: int = 1, **unknown: int):
        for name in unknown:
            raise ConfigError(f"unknown mesh axis {name!r}: axes are {', '.join(AXES)}{did_you_mean(name, AXES)}")
        for name, degree in zip(AXES, (dp, cfg, ring, ulysses, tp), strict=True):
            if not is_whole(degree, least=1):
                raise ConfigError(f"{name}={degree!r}: a degree is a whole number of ranks, 1 or more")
            object.__setattr__(self, name, degree)

    @property
    def world_size(self) -> int:
        """Number of ranks: the product of the degrees."""
        return math.prod(self.degrees.values())

    @property
    def degrees(self) -> dict[str, int]:
        """Degree by axis name, outermost first."""
        return {name: getattr(self, name) for name in AXES}

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where ``rank`` sits on every axis, outermost first."""
        if not 0 <= rank < self.world_size:
            raise ConfigError(f"rank {rank} is outside this mesh of {self.world_size}: ranks count from 0")
        place = {}
        for name in reversed(AXES):
            rank, place[name] = divmod(rank, getattr(self, name))
        return {name: place[name] for name in AXES}

    def __str__(self) -> str:
        split = [f"{name}={degree}" for name, degree in self.degrees.items() if degree > 1]
        return " × ".join(split) or "one rank"
