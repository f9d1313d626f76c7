"""Every error that multicard raises on purpose.

MulticardError
├── ConfigError (ValueError)               invalid input: a flag, a degree, a config's value
├── UnsupportedError (NotImplementedError) refused by name, with what to do instead
├── CheckpointError (ValueError)           a checkpoint's files are missing, truncated, damaged or of the wrong shape
└── RankError (RuntimeError)               a rank failed; says which
    ├── CollectiveTimeout (TimeoutError)   a rank did not arrive at a collective in time
    └── MismatchError                      ranks disagree about a collective, or were given different inputs
"""

from __future__ import annotations


class MulticardError(Exception):
    """Base of all of multicard's own errors."""


class ConfigError(MulticardError, ValueError):
    """Invalid input. The message names the value, the limit and the fix."""


class UnsupportedError(MulticardError, NotImplementedError):
    """A combination that is refused rather than computed wrongly. The message says what to do instead."""


class CheckpointError(MulticardError, ValueError):
    """A checkpoint's files are missing, truncated, damaged or don't fit its config. The message names the file."""


class RankError(MulticardError, RuntimeError):
    """A rank failed.

    Attributes (None if not applicable):
        rank: the rank that failed first.
        signal: the number of the signal that killed it.
        collective: the collective that ranks were in.
        sequence_number: that collective's number, counted from 1 in its group.
        stderr: the last lines of that rank's standard error.
    """

    def __init__(
        self,
        message: str = "",
        *,
        rank: int | None = None,
        signal: int | None = None,
        collective: str | None = None,
        sequence_number: int | None = None,
        stderr: str | None = None,
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.signal = signal
        self.collective = collective
        self.sequence_number = sequence_number
        self.stderr = stderr


class CollectiveTimeout(RankError, TimeoutError):
    """A collective waited longer than its timeout. ``rank`` is the rank that did not arrive."""


class MismatchError(RankError):
    """Ranks entered different collectives, or one with different arguments, or were given different inputs."""
