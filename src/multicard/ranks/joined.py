"""Ranks that a launcher (torchrun, ``multicard run``, srun) started: this process is one; all make the same calls."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from multicard import collectives
from multicard.errors import UnsupportedError
from multicard.mesh import ParallelMesh, init_mesh
from multicard.ranks.kept import Shelf
from multicard.ranks.settings import Settings


class Joined:
    """A :class:`multicard.ranks.crew.Crew` inside a job: nothing is started; functions run in this process.

    Values by rank are exchanged as JSON and tensors, since nothing is unpickled from a socket.
    """

    alive, told = True, False

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.pids: list[int] = []
        self._shelf = Shelf()

    def join(self) -> None:
        wanted = self._settings
        self._mesh = init_mesh(
            wanted.config,
            backend=wanted.backend,
            device=wanted.device,
            timeout=wanted.timeout,
            compare_inputs=wanted.compare_inputs,
        )

    def run(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Run ``fn(mesh, ...)`` here; then two all-gathers over the world exchange all ranks' values."""
        return gather_values(self._call(fn, args, kwargs), self._mesh)

    def keep(self, key: int, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[float]:
        value: Any = self._call(fn, args, kwargs)
        if isinstance(value, types.GeneratorType):
            yield from self._shelf.fill(key, value)
        else:
            self._shelf[key] = value

    def drop(self, key: int) -> None:
        self._shelf.pop(key, None)

    def stream(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
        """The items of this rank's own generator."""
        return self._call(fn, args, kwargs)

    def end(self, why: str | BaseException, grace: float = 0.0) -> None:
        """Does nothing: the ranks end with the job."""

    def _call(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        args, kwargs = self._shelf.resolve(args, kwargs)
        return fn(self._mesh, *args, **kwargs)


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

    def build(plain: Any) -> Any:
        nonlocal rest
        if not isinstance(plain, dict):
            return plain
        ((kind, inner),) = plain.items()
        if kind == "tensor":
            dtype, shape = getattr(torch, inner[0]), inner[1]
            count = dtype.itemsize * torch.Size(shape).numel()
            data, rest = rest[:count], rest[count:]
            return data.clone().view(dtype).reshape(shape)
        if kind == "dict":
            return {key: build(item) for key, item in inner}
        items = [build(item) for item in inner]
        return items if kind == "list" else tuple(items)

    return build(json.loads(bytes(part[:length].numpy())))
