"""What a job of ranks is started with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from multicard.config import ParallelConfig
from multicard.ranks.hosts import Hosts


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a job is started with; :class:`multicard.launch.Ranks` describes the fields.

    ``log_mode`` is how log files are opened: "a" after a restart, which is when somebody wants to read them.
    """

    config: ParallelConfig
    timeout: float = 60.0
    start_timeout: float = 300.0
    threads_per_rank: int | None = None
    backend: str = "auto"
    device: str = "auto"
    check: bool = False
    log_dir: str | None = None
    log_mode: str = "w"
    console: str = "rank0"
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    hosts: Hosts = dataclasses.field(default_factory=Hosts)

    @property
    def ranks(self) -> range:
        """Those on this host."""
        here = self.config.world_size // self.hosts.count
        return range(self.hosts.index * here, (self.hosts.index + 1) * here)
