"""The state of a call and of every rank at one moment."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from multicard.ranks.activity import Report
from multicard.ranks.failure import Failure


@dataclasses.dataclass(frozen=True)
class Seen:
    """The parent's view of one rank.

    Attributes:
        answered: when it finished the call, with or without an error, or died; None: it is still in the call.
        failure: its failure in the call, or its death.
        dead: whether its process has ended.
        stopped: since when it has been stopped (or was, until it was woken to report); None: it runs.
        report: its latest report of what it is doing; None: it hasn't reported in this call.
        unchanged: since when its reports have named the same collective and counts.
    """

    answered: float | None = None
    failure: Failure | None = None
    dead: bool = False
    stopped: float | None = None
    report: Report | None = None
    unchanged: float = math.inf


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A call, named ``label`` in errors, and every rank of this host. Moments are ``time.monotonic()``.

    Attributes:
        asked: when ranks were last asked what they are doing.
        deadline: the moment by which all must have answered; only starting has one.
    """

    now: float
    label: str
    ranks: Mapping[int, Seen]
    asked: float
    deadline: float = math.inf

    @property
    def waiting(self) -> dict[int, Seen]:
        """Ranks that are still in the call."""
        return {rank: seen for rank, seen in self.ranks.items() if seen.answered is None}

    @property
    def finished(self) -> float:
        """When the last rank answered; infinite while one hasn't."""
        return max(math.inf if seen.answered is None else seen.answered for seen in self.ranks.values())

    def failures(self, until: float = math.inf) -> list[Failure]:
        """The failures of ranks up to that moment."""
        return [s.failure for s in self.ranks.values() if s.failure and s.answered is not None and s.answered <= until]

    def reports(self, since: float) -> dict[int, Report]:
        """The reports that ranks have made since that moment, by rank."""
        return {rank: s.report for rank, s in self.ranks.items() if s.report is not None and s.report.moment >= since}
