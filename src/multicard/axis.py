"""One axis of the mesh: which ranks a rank communicates with."""

from __future__ import annotations

import dataclasses

import torch.distributed as dist

from multicard.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Axis:
    """One mesh axis as a rank sees it; what every layer and collective takes.

    An axis of size 1 has no group, and every collective on it is the identity: the same model runs on one card without
    ``torch.distributed`` initialised.
    """

    name: str
    rank: int
    size: int
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ConfigError(f"rank {self.rank} of axis {self.name!r} is outside its {self.size}: ranks count from 0")
