"""Where a launcher (``multicard run``, torchrun, srun) put this process, and the launcher's other settings."""

from __future__ import annotations

import dataclasses
import json
import os
import re

from multicard.config import ParallelConfig


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a launcher put this process.

    Attributes:
        rank, world_size: among all ranks.
        local_rank, local_world_size: among this host's ranks.
        address, port: of the job's store.
        hosts_store: rank 0 has to host the store: no launcher does.
        store: the descriptor of a file that is the store, which ranks of one host inherit from multicard.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int
    hosts_store: bool
    store: int | None = None

    @property
    def one_host(self) -> bool:
        return self.local_world_size == self.world_size


def place() -> Place | None:
    """This process's place in a job, from the environment of ``multicard run``, torchrun or srun; None outside any."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _torch_place()
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:  # srun, not its shell
        return _slurm_place()
    return None


def _torch_place() -> Place:
    size = int(os.environ["WORLD_SIZE"])
    here, file = int(os.environ.get("LOCAL_WORLD_SIZE", size)), os.environ.get("MULTICARD_STORE")
    return Place(
        rank=int(os.environ["RANK"]),
        world_size=size,
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        local_world_size=here,
        address=os.environ.get("MASTER_ADDR", "127.0.0.1"),
        port=int(os.environ.get("MASTER_PORT", 29500)),
        hosts_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        store=int(file) if file and here == size else None,
    )


def slurm_store() -> tuple[str, int]:
    """A SLURM job's store: on its first node, at a port from the job id, unless MASTER_ADDR and MASTER_PORT are set."""
    first = re.match(r"[^,\[]+(\[\d+)?", os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    address = first.group().replace("[", "") if first else "127.0.0.1"
    port = 20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 10000
    return os.environ.get("MASTER_ADDR", address), int(os.environ.get("MASTER_PORT", port))


def _slurm_place() -> Place:
    address, port = slurm_store()
    tasks = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ["SLURM_STEP_NUM_TASKS"]))
    return Place(
        rank=int(os.environ["SLURM_PROCID"]),
        world_size=int(os.environ["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(os.environ["SLURM_LOCALID"]),
        local_world_size=int(tasks.group()) if tasks else 1,
        address=address,
        port=port,
        hosts_store=True,
    )


def in_job() -> bool:
    """Whether a launcher (ours, torchrun, srun) started this process as a rank."""
    return place() is not None


def is_first() -> bool:
    """Whether this process is the one that prints: a job's rank 0, or a process outside any job."""
    here = place()
    return here is None or here.rank == 0


def config_from_environment() -> ParallelConfig | None:
    """The degrees given to ``multicard run``, or None."""
    degrees = os.environ.get("MULTICARD_MESH")
    return ParallelConfig(**json.loads(degrees)) if degrees else None


def checking() -> bool:
    """Whether ranks compare collectives before they run: MULTICARD_CHECK=1, which ``check=True`` sets too."""
    return _switch("MULTICARD_CHECK", "0")


def comparing() -> bool:
    """Whether ranks compare their inputs: unless MULTICARD_COMPARE_INPUTS=0."""
    return _switch("MULTICARD_COMPARE_INPUTS", "1")


def compiling() -> bool:
    """Whether ranks compile without being asked to: unless MULTICARD_COMPILE=0."""
    return _switch("MULTICARD_COMPILE", "1")


def _switch(name: str, default: str) -> bool:
    return os.environ.get(name, default) not in ("", "0")
