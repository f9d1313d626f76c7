"""Handles of operations under way."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Message(Protocol):
    """A point-to-point message under way."""

    peer: int

    @property
    def complete(self) -> bool:
        """Whether it has arrived, or has been sent."""


class Driver(Protocol):
    """Moves a group's messages."""

    def drive(self, messages: Sequence[Any]) -> None:
        """Wait until these messages have arrived."""

    def progress(self) -> object:
        """Move messages as far as possible without waiting."""


class Work(dist.Work):
    """An operation's handle. Collectives are complete when they return; messages are when ``wait`` returns.

    Args:
        tensors: the value of a future of this work.
        driver, messages: the mover of messages, and the messages that must arrive first.
    """

    def __init__(
        self, tensors: Sequence[Any] = (), driver: Driver | None = None, messages: Sequence[Message] = ()
    ) -> None:
        super().__init__()
        self._tensors, self.driver, self.messages = tensors, driver, messages
        self._done = not messages

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        if not self._done and self.driver is not None:
            self.driver.drive(self.messages)
            self._done = True
        return True

    def is_completed(self) -> bool:
        if not self._done and self.driver is not None:
            self.driver.progress()
            self._done = all(message.complete for message in self.messages)
        return self._done

    def is_success(self) -> bool:
        return self.is_completed()

    def synchronize(self) -> None:
        self.wait()

    def source_rank(self) -> int:
        return self.messages[0].peer

    _source_rank = source_rank

    def result(self) -> list[Tensor]:
        self.wait()
        return list(self._tensors)

    def get_future(self) -> torch.futures.Future:
        """A completed future: no thread moves messages in the background, so this waits for them."""
        self.wait()
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(self._tensors)
        return future
