"""Ranks that a launcher (torchrun, ``multicard run``, srun) started: this process is one; all make the same calls."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import torch

from multicard import collectives
from multicard.errors import UnsupportedError
from multicard.mesh import ParallelMesh, init_mesh
from multicard.ranks.kept import Shelf
from multicard.ranks.settings import Settings


class Joined:
    """What :class:`multicard.ranks.children.Children` is outside a job: nothing is started, functions run right here.

    Values by rank are exchanged as JSON and tensors, since nothing is unpickled from a socket.
    """

    alive, told = True, False

    def __init__(self, settings: Settings) -> None:
        self._settings, self._shelf = settings, Shelf()
        self.pids: list[int] = []

    def join(self) -> None:
        self._shelf.mesh = init_mesh(**self._settings.mesh)

    def run(self, *call: Any) -> list[Any]:
        """``fn(mesh, ...)`` here, and then two all-gathers over the world for everybody's value."""
        return gather_values(self._shelf.call(*call), self._shelf.mesh)

    def keep(self, key: int, *call: Any) -> Iterator[float]:
        return self._shelf.keep(key, *call)

    def drop(self, key: int) -> None:
        self._shelf.pop(key, None)

    def stream(self, *call: Any) -> Iterator[Any]:
        """What this rank's own generator yields."""
        return self._shelf.call(*call)

    def end(self, why: str | BaseException, grace: float = 0.0) -> None:
        """Does nothing: the ranks end with the job."""


def gather_values(value: Any, mesh: ParallelMesh) -> list[Any]:
    """All ranks' ``value`` by rank, with tensors on the CPU. Two all-gathers over the world: of sizes, and of bytes.

    Raises:
        UnsupportedError: it has other types than None, bool, int, float, str, list, tuple, dict with str keys, tensors.
    """
    tensors: list[torch.Tensor] = []
    text = json.dumps(_plain(value, tensors)).encode()
    raw = [torch.frombuffer(bytearray(text), dtype=torch.uint8)]
    raw += [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
    mine = torch.cat(raw).to(mesh.device)
    counts = torch.tensor([len(text), mine.numel()], device=mesh.device)
    sizes = collectives.all_gather(counts, mesh.world).view(-1, 2).tolist()
    everything = collectives.all_gather(mine, mesh.world, sizes=[size for _, size in sizes]).cpu()
    parts = everything.split([size for _, size in sizes])
    return [_value(part, length) for part, (length, _) in zip(parts, sizes, strict=True)]


def _plain(value: Any, tensors: list[torch.Tensor]) -> Any:
    """``value`` as JSON, each container and tensor as a one-key object."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_plain(item, tensors) for item in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": [[key, _plain(item, tensors)] for key, item in value.items()]}
    raise UnsupportedError(
        f"a value of type {type(value).__name__} can't be exchanged between a job's ranks: return tensors, numbers, "
        "strings, lists, tuples or dicts, or start the ranks with mc.launch outside any job"
    )


def _value(part: torch.Tensor, length: int) -> Any:
    """One rank's value from its bytes: ``length`` bytes of JSON, then its tensors' data in the order of the JSON."""
    rest = part[length:]

    def build(wrapped: dict[str, Any]) -> Any:
        nonlocal rest
        ((kind, inner),) = wrapped.items()
        if kind != "tensor":
            return {"list": list, "tuple": tuple, "dict": dict}[kind](inner)
        dtype, shape = getattr(torch, inner[0]), inner[1]
        count = dtype.itemsize * math.prod(shape)
        data, rest = rest[:count], rest[count:]
        return data.clone().view(dtype).reshape(shape)

    return json.loads(bytes(part[:length].numpy()), object_hook=build)
