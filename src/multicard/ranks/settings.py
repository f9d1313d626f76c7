"""What a job of ranks is started with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from multicard.config import ParallelConfig
from multicard.errors import ConfigError
from multicard.ranks.hosts import Hosts

LONGEST = 1e9
"""Seconds: thirty years."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a job is started with; :class:`multicard.launch.Ranks` describes the fields.

    ``log_mode`` is how log files are opened: "a" after a restart, which is when somebody wants to read them.

    Raises:
        ConfigError: a number that can't be meant.
    """

    config: ParallelConfig
    timeout: float = 60.0
    start_timeout: float = 300.0
    threads_per_rank: int | None = None
    backend: str = "auto"
    device: str = "auto"
    check: bool = False
    compare_inputs: bool = True
    log_dir: str | None = None
    log_mode: str = "w"
    console: str = "rank0"
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    hosts: Hosts = dataclasses.field(default_factory=Hosts)

    def __post_init__(self) -> None:
        for name in ("timeout", "start_timeout"):
            seconds = getattr(self, name)
            if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 < seconds < LONGEST:
                raise ConfigError(f"{name}={seconds!r}: seconds, more than 0 and less than {LONGEST:g}")
        threads = self.threads_per_rank
        if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
            raise ConfigError(f"threads_per_rank={threads!r}: a whole number of 1 or more, or None")

    @property
    def ranks(self) -> range:
        """Those on this host."""
        here = self.config.world_size // self.hosts.count
        return range(self.hosts.index * here, (self.hosts.index + 1) * here)
