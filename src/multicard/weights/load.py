"""Loading a checkpoint: each rank reads only its own slices.

Files are read with ``pread``, never mapped: if a file is truncated while it is open, that is an error
instead of a SIGBUS. Every fault is a :class:`~multicard.errors.CheckpointError` that names the file, the same on every
rank.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from multicard import collectives, errors
from multicard.axis import Axis
from multicard.errors import CheckpointError, MulticardError
from multicard.layers.shard import shard_of
from multicard.weights.files import TensorFiles, verify
from multicard.weights.formats import open_files
from multicard.weights.source import Plain, Reader, Source

SourceOf = Callable[[str], Source | None]
"""The source of a parameter or buffer by its name in the model; None: the checkpoint has nothing for it."""

Finish = Callable[[nn.Module], int]


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """Sizes and time of loading on one rank.

    Attributes:
        bytes_read: of tensors; headers and the index are a few kilobytes more.
        shard_bytes: size of this rank's slices in the files; less than ``bytes_read`` if a tensor had to be converted
            or blocks of a quantised one are cut.
        parameter_bytes: size of its parameters in memory.
        peak_bytes: the largest total of parameters, staging buffers and a weight that is being reordered.
        seconds: from the first tensor to the last.
        dequantized_bytes: how much of ``parameter_bytes`` the files hold quantised, in fewer bytes.
    """

    bytes_read: int
    shard_bytes: int
    parameter_bytes: int
    peak_bytes: int
    seconds: float
    dequantized_bytes: int = 0


def same_names(checkpoint: TensorFiles) -> SourceOf:
    """The source of each parameter: the tensor of the same name."""
    return Plain


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    world: Axis,
    device: torch.device | str = "cpu",
    sources: Callable[[TensorFiles], SourceOf] = same_names,
    *,
    stem: str = "model",
    ignored: Callable[[str], bool] | None = None,
    checksums: bool = False,
    finish: Finish | None = None,
) -> Iterator[float | LoadReport]:
    """Give every parameter and persistent buffer of ``model``, which may be on "meta", this rank's part of it.

    A generator: it yields the fraction done, from 0 to 1, after each tensor, equally often on every rank, and then the
    :class:`LoadReport`. After each tensor ranks meet at a barrier, so that a rank without progress is named within the
    timeout, which applies to single tensors: loading as a whole may take any time. One all-gather before the first
    tensor and one after the last tell every rank of a failure on any.

    Args:
        path: a folder with safetensors files whose names begin with ``stem``, or a GGUF file.
        world: the ranks that load together.
        sources: from the open checkpoint to the function that gives each parameter's source.
        ignored: see :func:`check`.
        checksums: first compare the files with the folder's SHA256SUMS; the files are divided over the ranks.
        finish: called with each module once its parameters are loaded; it may replace them. Returns the bytes that it
            held twice for a moment, without those of matrices that are read one at a time.

    Raises:
        CheckpointError: a file that is missing, damaged or was truncated, or a tensor that is missing or of another
            shape, on some rank; raised on every rank, naming the file or tensor.
    """
    with contextlib.ExitStack() as stack:
        failure = None
        try:
            checkpoint = stack.enter_context(contextlib.closing(open_files(path, stem)))
            source_of = sources(checkpoint)
            check(model, checkpoint, source_of, ignored)
            if checksums:
                verify(checkpoint.files, world.rank, world.size)
        except MulticardError as error:
            failure = error
        agree(failure, world, device)
        begin, placer = time.perf_counter(), _Placer(model, Reader(checkpoint), source_of, torch.device(device), finish)
        yield from placer.run(world)
        yield placer.report(time.perf_counter() - begin)


def check(
    model: nn.Module,
    checkpoint: TensorFiles,
    source_of: SourceOf,
    ignored: Callable[[str], bool] | None = None,
) -> None:
    """Check that the checkpoint has every tensor that ``model`` needs, in its shape.

    Args:
        ignored: whether a tensor of the checkpoint, by name, may be absent from the model; all others must be in it.
            None: all may be absent.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or not in the model. No tensor has been read.
    """
    needed: dict[str, tuple[int, ...]] = {}
    seen: set[int] = set()
    for name, tensor in ((name, tensor) for _, owned in _owners(model) for name, _, tensor in owned):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        shard, source = shard_of(tensor), source_of(name)
        if shard.fill is not None:
            continue
        if source is None:
            raise CheckpointError(f"{checkpoint.where}: no tensor for {name!r}, which the config asks for")
        needed |= source.shapes(shard)
    for name, shape in needed.items():
        entry = checkpoint.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{checkpoint.where}: no tensor {name!r}, which the config asks for")
        if entry.shape != shape:
            raise CheckpointError(f"{entry.path}: {name} has shape {entry.shape} where the config asks for {shape}")
        entry.check_dtype()
    for name, entry in checkpoint.tensors.items():
        if name not in needed and ignored is not None and not ignored(name):
            raise CheckpointError(f"{entry.path}: the model of this config has no tensor {name!r}")


def agree(failure: MulticardError | None, world: Axis, device: torch.device | str = "cpu") -> None:
    """If any rank failed, raise the error of the first that did on every rank. One all-gather."""
    message = torch.zeros(1024, dtype=torch.uint8)
    text = f"{type(failure).__name__} {failure}".encode(errors="replace")[:1024] if failure is not None else b""
    message[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    for row in collectives.all_gather(message[None].to(device), world).cpu():
        if found := bytes(row.tolist()).rstrip(b"\0"):
            name, _, words = found.decode(errors="replace").partition(" ")
            raise getattr(errors, name)(words)


Owned = list[tuple[str, str, Tensor]]
"""A module's own tensors: name in the model, name in the module, tensor."""


def _owners(model: nn.Module) -> list[tuple[nn.Module, Owned]]:
    """Modules with parameters or persistent buffers of their own."""
    found, persistent = [], set(model.state_dict(keep_vars=True))
    for path, module in model.named_modules():
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        named = [(f"{path}.{leaf}".lstrip("."), leaf, tensor) for leaf, tensor in own]
        if kept := [each for each in named if each[0] in persistent]:
            found.append((module, kept))
    return found


def _size(owned: Owned) -> int:
    return sum(tensor.numel() for _, _, tensor in owned)


class _Placer:
    """Reads tensors, puts them in their modules, and counts bytes."""

    def __init__(
        self, model: nn.Module, reader: Reader, source_of: SourceOf, device: torch.device, finish: Finish | None
    ) -> None:
        self._reader, self._source_of, self._device, self._finish = reader, source_of, device, finish
        # Largest first: a weight is held twice while it is reordered, which fits best before the others are loaded.
        self._modules = sorted(_owners(model), key=lambda item: -_size(item[1]))
        # ``_modules`` holds the declared tensors, so their ids aren't reused.
        self._uses = collections.Counter(id(tensor) for _, owned in self._modules for _, _, tensor in owned)
        self._shared = {key for key, uses in self._uses.items() if uses > 1}
        self._placed: dict[int, Tensor] = {}
        self._scratch: Tensor | None = None
        self._allocated = self._peak = 0

    def run(self, world: Axis) -> Iterator[float]:
        """Read and place all tensors. Yields the fraction done after each."""
        failure, done = None, 0
        total = max(1, sum(_size(owned) for _, owned in self._modules))
        for module, owned in self._modules:
            for name, leaf, declared in owned:
                try:
                    if failure is None:
                        self._place(module, leaf, name, declared)
                except CheckpointError as error:
                    failure = error
                collectives.barrier(world)
                done += declared.numel()
                yield done / total
            if failure is None:
                self._complete(module)
        agree(failure, world, self._device)

    def report(self, seconds: float) -> LoadReport:
        reader = self._reader
        sizes = reader.bytes_read, reader.shard_bytes, self._allocated, self._peak
        return LoadReport(*sizes, seconds, reader.dequantized_bytes)

    def _place(self, module: nn.Module, leaf: str, name: str, declared: Tensor) -> None:
        """Read one tensor and put it in its module; a tensor that several modules share is read once."""
        key = id(declared)
        placed = self._placed.pop(key, None)
        if placed is None:
            placed = _like(declared, self._read(name, declared))
        self._uses[key] -= 1
        if self._uses[key]:
            self._placed[key] = placed
        setattr(module, leaf, placed)

    def _complete(self, module: nn.Module) -> None:
        """Finish a module with all its tensors. A weight that is still in the scratch buffer is copied out of it."""
        if self._finish is not None:
            self._peak = max(self._peak, self._allocated + self._finish(module))
        scratch = None if self._scratch is None else self._scratch.data_ptr()
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_mkldnn and parameter.data_ptr() == scratch:
                setattr(module, leaf, _like(parameter, parameter.detach().clone()))

    def _read(self, name: str, declared: Tensor) -> Tensor:
        shard, source, reader = shard_of(declared), self._source_of(name), self._reader
        out = self._memory_for(declared)
        self._allocated += out.nbytes
        if shard.fill is not None or source is None:
            return out.fill_(shard.fill or 0.0)
        reader.staging = 0
        source.fill(reader, name, shard, out)
        scratch = 0 if self._scratch is None else self._scratch.nbytes
        self._peak = max(self._peak, self._allocated + scratch + reader.staging)
        return out

    def _memory_for(self, declared: Tensor) -> Tensor:
        """Memory for one tensor. On the CPU, matrices of one size that ``finish`` reorders share a buffer: freed one by
        one, they would fragment the heap."""
        shape, dtype = declared.shape, declared.dtype
        kept = self._finish is None or self._device.type != "cpu" or not isinstance(declared, nn.Parameter)
        if kept or len(shape) < 2 or id(declared) in self._shared:
            return torch.empty(shape, dtype=dtype, device=self._device)
        if self._scratch is None or self._scratch.shape != shape or self._scratch.dtype != dtype:
            self._scratch = None
            self._scratch = torch.empty(shape, dtype=dtype)
        return self._scratch.view(shape)


def _like(declared: Tensor, tensor: Tensor) -> Tensor:
    """``tensor`` as a parameter with all attributes of ``declared``, or as a buffer if ``declared`` is one."""
    if not isinstance(declared, nn.Parameter):
        return tensor
    parameter = nn.Parameter(tensor, requires_grad=False)
    parameter.__dict__.update(declared.__dict__)
    return parameter
