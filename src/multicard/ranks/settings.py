"""The settings of a job of ranks."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, TypedDict

from multicard.config import ParallelConfig
from multicard.errors import ConfigError
from multicard.ranks.hosts import Hosts
from multicard.values import did_you_mean, is_whole

LONGEST = 1e9
"""Seconds: thirty years."""


class Options(TypedDict, total=False):
    """How ranks are started: keyword arguments of ``launch``, ``Ranks``, ``LLM``, ``DiffusionPipeline``. See
    :class:`Settings`.
    """

    timeout: float
    start_timeout: float
    threads_per_rank: int | None
    backend: str
    device: str
    check: bool
    compare_inputs: bool
    log_dir: str | os.PathLike[str] | None
    console: str
    env: Mapping[str, str] | None


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a job.

    Attributes:
        config: the mesh; its ``world_size`` is the number of processes.
        timeout: seconds that one collective may wait; functions that run on ranks have no limit.
        start_timeout: seconds for all ranks to start and to meet at the first barrier.
        threads_per_rank: compute threads of each rank; None: OMP_NUM_THREADS, or else this process's cores ÷ ranks.
        backend: "auto", "shm", "gloo", or another backend of ``torch.distributed``.
        device: "auto", "cpu", "cuda", "npu", "xpu".
        check: compare every collective's arguments between ranks before it runs. MULTICARD_CHECK=1 means the same.
        compare_inputs: ranks that work on one request compare what each was given before they use it.
            MULTICARD_COMPARE_INPUTS=0 leaves it out too.
        log_dir: a folder that gets one ``rank<n>.log`` for each rank with all that it prints.
        console: whose output this process prints, with the rank's number before each line: "rank0", "all", "none".
        env: environment variables of the ranks beside this process's own.
        log_mode: how log files are opened: "a" after a restart, which is when somebody wants to read them.
        hosts: where the job runs, and which of them this is.

    Raises:
        ConfigError: a number outside its limits.
    """

    config: ParallelConfig
    timeout: float = 60.0
    start_timeout: float = 300.0
    threads_per_rank: int | None = None
    backend: str = "auto"
    device: str = "auto"
    check: bool = False
    compare_inputs: bool = True
    log_dir: str | os.PathLike[str] | None = None
    console: str = "rank0"
    env: Mapping[str, str] | None = None
    log_mode: str = "w"
    hosts: Hosts = dataclasses.field(default_factory=Hosts)

    @classmethod
    def of(cls, config: ParallelConfig, options: Options) -> Settings:
        """The settings with a caller's options.

        Raises:
            ConfigError: an unknown option, or a value outside its limits.
        """
        for name in options:
            if name not in Options.__annotations__:
                known = sorted(Options.__annotations__)
                raise ConfigError(f"unknown option {name!r}: must be {', '.join(known)}{did_you_mean(name, known)}")
        return cls(config=config, **options)

    def __post_init__(self) -> None:
        for name in ("timeout", "start_timeout"):
            seconds = getattr(self, name)
            if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 < seconds < LONGEST:
                raise ConfigError(f"{name}={seconds!r}: seconds, more than 0 and less than {LONGEST:g}")
        threads = self.threads_per_rank
        if threads is not None and not is_whole(threads, least=1):
            raise ConfigError(f"threads_per_rank={threads!r}: a whole number of 1 or more, or None")

    @property
    def mesh(self) -> dict[str, Any]:
        """What each rank gives to ``init_mesh``."""
        names = ("config", "backend", "device", "timeout", "compare_inputs")
        return {name: getattr(self, name) for name in names}

    @property
    def ranks(self) -> range:
        """The ranks on this host."""
        here = self.config.world_size // self.hosts.count
        return range(self.hosts.index * here, (self.hosts.index + 1) * here)
