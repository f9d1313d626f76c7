"""What a prompt has been answered so far."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple


@dataclasses.dataclass
class Answer:
    """A prompt and its answer so far.

    Args:
        number: the prompt's among the caller's, which determines its noise.
        tokens: of the prompt, then of the answer.
        room: how many more tokens the answer may have.
        stop: ids that end it.
        new: how many tokens it has.
        drafted, accepted: how many tokens were drafted for it, and how many of those it has.
    """

    number: int
    tokens: list[int]
    room: int
    stop: frozenset[int] = frozenset()
    new: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def outcome(self) -> Outcome:
        return Outcome(self.tokens[len(self.tokens) - self.new :], self.drafted, self.accepted)

    def add(self, token: int) -> int:
        """Append a token, and return it; a stop id leaves no room for others."""
        self.tokens.append(token)
        self.new += 1
        self.room = 0 if token in self.stop else self.room - 1
        return token

    def noise(self, tokens: int) -> list[tuple[int, int]]:
        """What the noise of the next tokens is keyed by: see :func:`multicard.models.sampling.choose`."""
        return [(self.number, step) for step in range(self.new, self.new + tokens)]


class Outcome(NamedTuple):
    """What a prompt was answered.

    Attributes:
        tokens: without the prompt.
        drafted, accepted: as in :class:`Answer`.
    """

    tokens: list[int]
    drafted: int
    accepted: int
