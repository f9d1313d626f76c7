"""Reading a checkpoint so that each rank reads its own slices of it, and nothing else.

safetensors files are read with ``pread``, never mapped: a file that is cut while it is open is an error here and a
SIGBUS there. Every fault is a :class:`~multicard.errors.CheckpointError` that names the file, the same on every rank.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from multicard import collectives, errors
from multicard.axis import Axis
from multicard.errors import CheckpointError, MulticardError
from multicard.layers.shard import Shard, shard_of, sharded
from multicard.weights.checkpoint import Checkpoint

Rename = Callable[[str], str]
Finish = Callable[[nn.Module], int]


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What loading took on one rank.

    Attributes:
        bytes_read: of tensors; headers and the index are a few kilobytes more.
        shard_bytes: what this rank's slices take in the files.
        parameter_bytes: what its parameters take in memory.
        peak_bytes: the most that parameters, the staging buffer and a weight being reordered took together.
        seconds: from the first tensor to the last.
    """

    bytes_read: int
    shard_bytes: int
    parameter_bytes: int
    peak_bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Slice:
    """Rows ``source`` of tensor ``name`` go to rows ``target`` of a parameter, both along its shard's dimension."""

    name: str
    source: range
    target: range


def slices(name: str, shard: Shard) -> list[Slice]:
    """What the parameter called ``name`` in its checkpoint is read from.

    A fused parameter is in the checkpoint in parts: ``...qkv_proj.weight`` as ``...q_proj.weight`` and so on.
    """
    module, _, leaf = name.rpartition(".")
    parent = module.rpartition(".")[0]
    found, start, at = [], 0, 0
    parts = [(f"{parent}.{part}.{leaf}", size) for part, size in shard.parts] or [(name, shard.shape[shard.dim])]
    bounds = []
    for part, size in parts:
        bounds.append((part, start, start + size))
        start += size
    for span in shard.spans:
        for part, first, last in bounds:
            low, high = max(span.start, first), min(span.stop, last)
            if low < high:
                found.append(Slice(part, range(low - first, high - first), range(at, at + high - low)))
                at += high - low
    return found


def expected_shapes(name: str, shard: Shard) -> dict[str, tuple[int, ...]]:
    """The tensors that the checkpoint must hold for a parameter, whole."""
    if not shard.parts:
        return {name: shard.shape}
    module, _, leaf = name.rpartition(".")
    parent = module.rpartition(".")[0]
    before, after = shard.shape[: shard.dim], shard.shape[shard.dim + 1 :]
    return {f"{parent}.{part}.{leaf}": (*before, size, *after) for part, size in shard.parts}


def check(model: nn.Module, checkpoint: Checkpoint, rename: Rename, ignored: Callable[[str], bool]) -> None:
    """The checkpoint has every tensor that ``model`` needs, in its shape, and none that the model has no place for.

    Raises:
        CheckpointError: it doesn't. No tensor is read, and every rank raises the same.
    """
    needed: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        needed |= expected_shapes(rename(name), shard_of(parameter))
    for name, shape in needed.items():
        entry = checkpoint.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{checkpoint.where}: no tensor {name!r}, which the config asks for")
        if entry.shape != shape:
            raise CheckpointError(f"{entry.path}: {name} has shape {entry.shape} where the config asks for {shape}")
        entry.check_dtype()
    for name, entry in checkpoint.tensors.items():
        if name not in needed and not ignored(name):
            raise CheckpointError(f"{entry.path}: the config has no place for its tensor {name!r}")


def load(
    model: nn.Module,
    checkpoint: Checkpoint,
    world: Axis,
    device: torch.device | str = "cpu",
    rename: Rename = str,
    finish: Finish = lambda module: 0,
) -> Iterator[int | LoadReport]:
    """Give every parameter of ``model``, which may be on "meta", this rank's part of the checkpoint's tensor.

    A generator: it yields the bytes read after each parameter, the same number of times on every rank, and the
    :class:`LoadReport` at last. After each parameter ranks meet at a barrier, so that one that gets nowhere is named
    within the timeout, and a slow disk may take as long as it likes for all of them. One all-gather at the end tells
    every rank of what went wrong on one.

    Args:
        world: the ranks that load together.
        rename: the model's name of a parameter to the checkpoint's.
        finish: called with each module whose parameters are there; it may put others in their place. Returns the bytes
            of which it held two for a moment, those of matrices that are read one at a time not counted.

    Raises:
        CheckpointError: a file that was cut, or can't be read, on some rank: on every rank, naming it.
    """
    begin, reader, failure = time.perf_counter(), _Reader(model, checkpoint, torch.device(device)), None
    for module, owned in _largest_first(model):
        for name, leaf, parameter in owned:
            try:
                if failure is None:
                    reader.place(module, leaf, rename(name), parameter)
            except CheckpointError as error:
                failure = error
            collectives.barrier(world)
            yield reader.bytes_read
        if failure is None:
            reader.held_twice(finish(module))
            reader.settle(module)
    agree(failure, world, device)
    yield reader.report(time.perf_counter() - begin)


def agree(failure: MulticardError | None, world: Axis, device: torch.device | str = "cpu") -> None:
    """Raise the first rank's failure on every rank, as that error. One all-gather."""
    message = torch.zeros(1024, dtype=torch.uint8)
    text = f"{type(failure).__name__} {failure}".encode(errors="replace")[:1024] if failure is not None else b""
    message[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    for row in collectives.all_gather(message[None].to(device), world).cpu():
        if found := bytes(row.tolist()).rstrip(b"\0"):
            name, _, told = found.decode(errors="replace").partition(" ")
            raise getattr(errors, name)(told)


def _largest_first(model: nn.Module) -> list[tuple[nn.Module, list[tuple[str, str, nn.Parameter]]]]:
    """Modules with parameters of their own, so ordered that the copy made while the largest are reordered is made when
    the others aren't there yet."""
    found = []
    for path, module in model.named_modules():
        owned = [
            (f"{path}.{leaf}" if path else leaf, leaf, parameter)
            for leaf, parameter in module.named_parameters(recurse=False)
        ]
        if owned:
            found.append((module, owned))
    return sorted(found, key=lambda item: -sum(parameter.numel() for _, _, parameter in item[1]))


class _Reader:
    """Parameters made out of slices, and the count of what that took."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, device: torch.device) -> None:
        self._checkpoint, self._device = checkpoint, device
        users = [p for module in model.modules() for p in module.parameters(recurse=False)]
        counts = collections.Counter(map(id, users))
        self._shared = {id(p): p for p in users if counts[id(p)] > 1}  # held, so that their ids stay theirs
        self._left = counts
        self._placed: dict[int, nn.Parameter] = {}
        self._scratch: Tensor | None = None
        self.bytes_read = self._allocated = self._peak = self._shard_bytes = 0

    def place(self, module: nn.Module, leaf: str, name: str, declared: nn.Parameter) -> None:
        """Read one parameter and put it in its module; one that several modules share is read once."""
        key = id(declared)
        placed = self._placed.pop(key, None)
        if placed is None:
            placed = self._read(name, declared)
        self._left[key] -= 1
        if self._left[key]:
            self._placed[key] = placed
        setattr(module, leaf, placed)

    def held_twice(self, size: int) -> None:
        self._peak = max(self._peak, self._allocated + size)

    def settle(self, module: nn.Module) -> None:
        """A weight that is still in the scratch buffer gets memory of its own."""
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            reordered = self._scratch is None or parameter.is_mkldnn
            if not reordered and parameter.data_ptr() == self._scratch.data_ptr():  # type: ignore[union-attr]
                setattr(module, leaf, sharded(parameter.detach().clone(), shard_of(parameter)))

    def report(self, seconds: float) -> LoadReport:
        return LoadReport(self.bytes_read, self._shard_bytes, self._allocated, self._peak, seconds)

    def _read(self, name: str, declared: nn.Parameter) -> nn.Parameter:
        shard = shard_of(declared)
        whole = self._memory_for(declared)
        self._allocated += whole.numel() * whole.element_size()
        scratch = 0 if self._scratch is None else self._scratch.numel() * self._scratch.element_size()
        for piece in slices(name, shard):
            target = whole.narrow(shard.dim, piece.target.start, len(piece.target))
            size, staging = self._checkpoint.read(piece.name, shard.dim, piece.source, target)
            self.bytes_read += size
            self._shard_bytes += self._checkpoint.tensors[piece.name].slice_bytes(shard.dim, len(piece.source))
            self._peak = max(self._peak, self._allocated + scratch + staging)
        return sharded(whole, shard)

    def _memory_for(self, declared: nn.Parameter) -> Tensor:
        """On the CPU matrices of one size come into one buffer, out of which they are reordered: as many that are
        freed in turn would leave holes."""
        shape, dtype = declared.shape, declared.dtype
        if self._device.type != "cpu" or len(shape) < 2 or id(declared) in self._shared:
            return torch.empty(shape, dtype=dtype, device=self._device)
        if self._scratch is None or self._scratch.shape != shape or self._scratch.dtype != dtype:
            self._scratch = None
            self._scratch = torch.empty(shape, dtype=dtype)
        return self._scratch.view(shape)
