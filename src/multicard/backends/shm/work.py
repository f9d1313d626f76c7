"""Handles of operations under way."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from multicard.backends.shm.channel import Transfer


class Driver(Protocol):
    """What moves messages along: a group."""

    def drive(self, transfers: Sequence[Transfer]) -> None:
        """Wait until these messages have arrived."""

    def progress(self) -> None:
        """Move messages along, as far as that goes without waiting."""


class ShmWork(dist.Work):
    """An operation's handle. Collectives are complete when they return; messages are when ``wait`` returns.

    Args:
        tensors: what a future of this gives.
        group, transfers: the messages that must arrive first.
    """

    def __init__(
        self,
        tensors: Sequence[Any] = (),
        group: Driver | None = None,
        transfers: Sequence[Transfer] = (),
    ) -> None:
        super().__init__()
        self._tensors, self._group, self.transfers = tensors, group, transfers

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        if self._group is not None:
            self._group.drive(self.transfers)
            self._group = None
        return True

    def is_completed(self) -> bool:
        if self._group is not None:
            self._group.progress()
            if all(transfer.complete for transfer in self.transfers):
                self._group = None
        return self._group is None

    def is_success(self) -> bool:
        return self.is_completed()

    def synchronize(self) -> None:
        self.wait()

    def source_rank(self) -> int:
        return self.transfers[0].peer

    _source_rank = source_rank

    def result(self) -> list[Tensor]:
        self.wait()
        return list(self._tensors)

    def get_future(self) -> torch.futures.Future:
        """A future that is complete: nothing moves messages along behind a program's back, so this waits."""
        self.wait()
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(self._tensors)
        return future
