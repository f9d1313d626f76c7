"""Which ranks communicate: the mesh, made of axes. ``ParallelConfig`` has the numbers; the groups are made here."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from multicard.axis import Axis
from multicard.config import AXES, ParallelConfig
from multicard.device import pick_device, rank_device
from multicard.errors import ConfigError
from multicard.join import join, limit_waits, pick_timeout
from multicard.place import comparing, config_from_environment, in_job


@dataclasses.dataclass(frozen=True, eq=False)
class ParallelMesh:
    """This rank's place on every axis.

    Attributes:
        config: the degrees.
        rank: this rank's number in the whole mesh.
        device: where this rank computes.
        tp, ulysses, ring, cfg, dp: the axes.
        sequence: ring x ulysses as one axis; its rank is ``ring·ULYSSES + ulysses`` and names the slice held.
        replica: cfg x ring x ulysses x tp as one axis: all ranks that work on one request.
        world: all ranks as one axis.
        device_mesh: the same mesh as a torch ``DeviceMesh``, for code that takes one; None with one rank.
        compares_inputs: whether ranks compare their inputs (see :mod:`multicard.replica`).
    """

    config: ParallelConfig
    rank: int
    device: torch.device
    dp: Axis
    cfg: Axis
    ring: Axis
    ulysses: Axis
    tp: Axis
    sequence: Axis
    replica: Axis
    world: Axis
    device_mesh: DeviceMesh | None = None
    compares_inputs: bool = True

    @property
    def world_size(self) -> int:
        return self.config.world_size

    def by_weights(self) -> ParallelMesh:
        """The same ranks with all of a replica on tp, for models that are split by weights alone."""
        config = ParallelConfig(dp=self.dp.size, tp=self.replica.size)
        alone: Any = {name: Axis(name, 0, 1) for name in ("cfg", "ring", "ulysses", "sequence")}
        return dataclasses.replace(self, config=config, tp=self.replica, device_mesh=None, **alone)


def single(device: str | torch.device = "cpu") -> ParallelMesh:
    """The mesh of one rank: no process group, every collective the identity."""
    return outline(ParallelConfig(), device)


def outline(config: ParallelConfig, device: str | torch.device = "cpu") -> ParallelMesh:
    """The first rank's mesh, without groups: for dry runs, as collectives can't run on it."""
    sizes = {
        **config.degrees,
        "sequence": config.ring * config.ulysses,
        "replica": config.world_size // config.dp,
        "world": config.world_size,
    }
    axes: Any = {name: Axis(name, 0, size) for name, size in sizes.items()}
    return ParallelMesh(config=config, rank=0, device=torch.device(device), device_mesh=None, **axes)


_meshes: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[ParallelConfig, ParallelMesh]] = (
    weakref.WeakKeyDictionary()
)  # a cache, not state: a process group has one set of sub-groups per config, and a second call must not make more


def init_mesh(
    config: ParallelConfig | None = None,
    *,
    backend: str = "auto",
    device: str = "auto",
    timeout: float = 60.0,
    compare_inputs: bool = True,
) -> ParallelMesh:
    """Join the job that this process is a rank of, and return its mesh; called again, the same mesh.

    Runs inside a rank: under ``torchrun``, ``multicard run``, SLURM, or once ``torch.distributed`` is initialised.
    Outside any job it is refused, unless the config has one rank. Collective: every rank must call it.

    Args:
        config: the degrees; None means those given to ``multicard run``, or one rank outside any job.
        backend: "auto" (shm for CPU ranks on one host, gloo for CPU ranks on several, NCCL, HCCL), or a name that
            ``torch.distributed`` knows.
        device: "auto", "cpu", "cuda", "npu", "xpu".
        timeout: seconds that one collective may wait.
        compare_inputs: whether the ranks that work on one request compare their inputs before they use them.
            MULTICARD_COMPARE_INPUTS=0 turns it off too.

    Raises:
        ConfigError: there is no job to join, or its world size isn't the config's.
    """
    config = config or config_from_environment() or ParallelConfig()
    if not dist.is_initialized() and not in_job():
        if config.world_size == 1:
            return single(pick_device(device))
        raise ConfigError(
            f"init_mesh({config}) outside any job: start {config.world_size} ranks with `multicard run`, "
            f"`torchrun --nproc-per-node {config.world_size}` or mc.launch"
        )
    timeout = pick_timeout(timeout)
    join(config.world_size, backend=backend, device=device, timeout=timeout)
    if config.world_size == 1:
        return single(rank_device(device))
    world = dist.distributed_c10d._get_default_group()
    known = _meshes.setdefault(world, {})
    if config not in known:
        known[config] = _build(config, rank_device(device), timeout)
    mesh, compares = known[config], compare_inputs and comparing()
    return mesh if mesh.compares_inputs == compares else dataclasses.replace(mesh, compares_inputs=compares)


def _build(config: ParallelConfig, device: torch.device, timeout: float) -> ParallelMesh:
    device_mesh = init_device_mesh(device.type, tuple(config.degrees.values()), mesh_dim_names=AXES)
    rank = dist.get_rank()
    place = config.coordinates(rank)

    def axis(name: str) -> Axis:
        size = getattr(config, name)
        return Axis(name, place[name], size, device_mesh.get_group(name) if size > 1 else None)

    axes: Any = {name: axis(name) for name in AXES}
    sequence = _joined("sequence", [axes["ring"], axes["ulysses"]], device_mesh)
    replica = _joined("replica", [axes[name] for name in AXES if name != "dp"], device_mesh)
    for group in {axis.group for axis in (*axes.values(), sequence, replica) if axis.group is not None}:
        limit_waits(group, timeout)  # torch gives sub-groups its own default, half an hour
    return ParallelMesh(
        config=config,
        rank=rank,
        device=device,
        **axes,
        sequence=sequence,
        replica=replica,
        world=Axis("world", rank, config.world_size, dist.group.WORLD),
        device_mesh=device_mesh,
    )


def _joined(name: str, axes: list[Axis], device_mesh: DeviceMesh) -> Axis:
    """Neighbouring axes, outermost first, as one. A new group only if no other has the same ranks."""
    rank, size = 0, 1
    for axis in axes:
        rank, size = rank * axis.size + axis.rank, size * axis.size
    split = [axis for axis in axes if axis.size > 1]
    if len(split) < 2:
        return Axis(name, rank, size, split[0].group if split else None)
    if size == device_mesh.size():
        return Axis(name, rank, size, dist.group.WORLD)
    return Axis(name, rank, size, device_mesh[tuple(axis.name for axis in split)]._flatten(name).get_group())
