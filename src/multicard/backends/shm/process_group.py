"""Backend "shm", registered on import."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import torch.distributed as dist

from multicard.backends.process_group import ProcessGroup, register
from multicard.backends.shm.group import Group
from multicard.place import checking


class ShmProcessGroup(ProcessGroup):
    """A :class:`~multicard.backends.shm.group.Group` as a process group of ``torch.distributed``.

    Attributes:
        shm: the group itself, for callers that don't need ``torch.distributed``'s argument handling.
    """

    backend = "shm"

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self.shm = group


def _make(store: dist.Store, rank: int, ranks: Sequence[int], timeout: datetime.timedelta) -> Group:
    return Group(store, rank, ranks, timeout.total_seconds(), checked=checking())


register(ShmProcessGroup, _make)
