"""``from_pretrained``: a ``transformers`` checkpoint of which every rank reads its own slices only.

The model is built and split on the meta device; each parameter's shard rule then says which bytes to read. Checkpoints
whose layout isn't the model's are converted by ``transformers``' own rules: renaming, and experts packed out of single
ones, by slices; any other conversion by reading what it needs whole, one group of tensors at a time.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import pathlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from multicard.errors import CheckpointError, ConfigError, UnsupportedError
from multicard.integrations.transformers.sources import Source, Sources, internal
from multicard.layers.shard import Shard, shard_of
from multicard.mesh import ParallelMesh
from multicard.weights import Checkpoint, LoadReport, agree, verify

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def build(
    path: str | os.PathLike[str],
    model_class: type[PreTrainedModel] | None,
    dtype: torch.dtype | str | None,
    **overrides: Any,
) -> PreTrainedModel:
    """The model of a checkpoint's config on the meta device; ``overrides`` change the config.

    Raises:
        CheckpointError: no config there, or none that transformers knows.
        ConfigError: an override that the config doesn't have.
        UnsupportedError: quantized weights, or a class that has to be named.
    """
    from transformers import AutoConfig, GenerationConfig

    if not (pathlib.Path(path) / "config.json").is_file():
        raise CheckpointError(f"{path}: no config.json there; download a checkpoint first with `hf download NAME`")
    try:
        config, unknown = AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, return_unused_kwargs=True, **overrides
        )
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path}/config.json: transformers doesn't know this model ({error})") from None
    if unknown:
        raise ConfigError(
            f"from_pretrained: {', '.join(sorted(unknown))}: neither a setting of {type(config).__name__} nor an "
            "argument of ours (model_class, dtype, plan); where weights go is said by the mesh"
        )
    if getattr(config, "quantization_config", None):
        raise UnsupportedError(f"{path} holds quantized weights, which can't be split: use an unquantized checkpoint")
    if dtype == "auto":  # as transformers calls the config's
        dtype = None
    with torch.device("meta"):
        model = _model_class(config, model_class)._from_config(config, dtype=dtype or config.dtype or torch.float32)
    if model.can_generate() and (pathlib.Path(path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model


def _model_class(config: PreTrainedConfig, model_class: type[PreTrainedModel] | None) -> type[PreTrainedModel]:
    import transformers

    if model_class is not None:
        return model_class
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    if named and named[0] is not None:
        return named[0]
    raise UnsupportedError(
        f"the config says architectures={config.architectures}, which this transformers doesn't have: pass model_class="
    )


def load(
    model: PreTrainedModel, path: str | os.PathLike[str], mesh: ParallelMesh, sources: Sources, checksums: bool = False
) -> LoadReport:
    """Read this rank's part of every parameter of a split model, and compute its buffers. One all-gather.

    Args:
        sources: made before the model was split.
        checksums: compare the files with the folder's SHA256SUMS first; ranks share the files.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or damaged; the same on every rank.
    """
    failure, begin, bytes_read = None, time.perf_counter(), 0
    try:
        with Checkpoint(path) as checkpoint:
            if checksums:
                verify(checkpoint, mesh.world.rank, mesh.world.size)
            loader = _Loader(model, checkpoint, mesh.device, sources.find(checkpoint))
            loader.run()
            bytes_read = loader.bytes_read
    except CheckpointError as error:
        failure = error
    agree(failure, mesh.world)
    nothing: Any = set()
    move = internal(model, "_move_missing_keys_from_meta_to_device")
    move(nothing, {"": mesh.device}, None, None)  # nothing is missing, but buffers are on the meta device
    for tensor in (*model.parameters(), *dict(_persistent_buffers(model)).values()):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    model.initialize_weights()
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    return LoadReport(bytes_read, bytes_read, held, held, time.perf_counter() - begin)


def _persistent_buffers(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    temporary = {name for name, _ in model.named_non_persistent_buffers()}
    return [(name, buffer) for name, buffer in model.named_buffers() if name not in temporary]


class _Loader:
    """Parameters read one by one; one that stands in several places is read once."""

    def __init__(
        self, model: PreTrainedModel, checkpoint: Checkpoint, device: torch.device, sources: Mapping[str, Source]
    ) -> None:
        self.model, self.checkpoint, self.device, self.sources = model, checkpoint, device, sources
        self.places: dict[int, list[str]] = {}
        self.declared: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.places.setdefault(id(parameter), []).append(name)
            self.declared[name] = parameter
        for name, buffer in _persistent_buffers(model):
            self.places[id(buffer)], self.declared[name] = [name], buffer
        self.done: set[str] = set()
        self.bytes_read = 0

    def run(self) -> None:
        for name in list(self.declared):
            if name not in self.done:
                self.read(name)

    def read(self, name: str) -> None:
        parameter = self.declared[name]
        if hasattr(parameter, "filled"):
            self.put(name, torch.full(parameter.shape, parameter.filled, dtype=parameter.dtype, device=self.device))
            return
        source = self.sources.get(name)
        if source is None:
            raise CheckpointError(f"{self.checkpoint.where}: no tensor for {name!r}, which the config asks for")
        if source.converter is None:
            self.put(name, self.plain(source.keys[""][0], parameter))
        elif source.packed:
            self.put(name, self.packed(list(source.keys.values()), parameter, name))
        else:
            self.converted(name, source)

    def put(self, name: str, value: Tensor) -> None:
        """Stand ``value`` in for the declared tensor everywhere."""
        declared = self.declared[name]
        if isinstance(declared, nn.Parameter):
            new: Tensor = nn.Parameter(value, requires_grad=False)
            new.__dict__.update(declared.__dict__)
        else:
            new = value
        for place in self.places[id(declared)]:
            owner, _, leaf = place.rpartition(".")
            setattr(self.model.get_submodule(owner), leaf, new)
            self.done.add(place)

    def plain(self, key: str, parameter: Tensor) -> Tensor:
        """A tensor that is in the checkpoint as it is in the model, or (Conv1D) transposed."""
        shard, transposed = shard_of(parameter), getattr(parameter, "transposed", False)
        if transposed:
            shard = Shard(shard.shape[::-1], 1 - shard.dim, shard.spans)
        self.expect(key, shard.shape)
        out = torch.empty(shard.local_shape, dtype=parameter.dtype, device=self.device)
        self.fill(out, key, shard.dim, shard.spans)
        return out.T.contiguous() if transposed else out

    def fill(self, out: Tensor, key: str, dim: int, spans: tuple[range, ...], start: int = 0) -> int:
        """Spans of a tensor, one after the other, into ``out`` from ``start`` on; returns where they end."""
        if not out.dim():
            self.scalar(key)
            self.bytes_read += self.checkpoint.read(key, 0, range(1), out.view(1))[0]
        for span in spans if out.dim() else ():
            self.bytes_read += self.checkpoint.read(key, dim, span, out.narrow(dim, start, len(span)))[0]
            start += len(span)
        return start

    def scalar(self, key: str) -> None:
        self.checkpoint.tensors[key] = dataclasses.replace(self.checkpoint.tensors[key], shape=(1,))

    def expect(self, key: str, shape: tuple[int, ...]) -> None:
        entry = self.checkpoint.tensors[key]
        if entry.shape != shape:
            raise CheckpointError(f"{entry.path}: {key} has shape {entry.shape} where the config asks for {shape}")
        entry.check_dtype()

    def packed(self, groups: list[list[str]], parameter: Tensor, name: str) -> Tensor:
        """``(experts, out, in)`` out of single experts' matrices; several groups are put together along ``out``."""
        shard = shard_of(parameter)
        experts, rows, columns = shard.shape
        share = rows // len(groups)
        if any(len(keys) != experts for keys in groups):
            raise CheckpointError(
                f"{self.checkpoint.where}: {name} needs {experts} experts, not {list(map(len, groups))}"
            )
        out = torch.empty(shard.local_shape, dtype=parameter.dtype, device=self.device)
        for expert in range(experts):
            at = 0
            for number, keys in enumerate(groups):
                self.expect(keys[expert], (share, columns))
                if shard.dim == 2:
                    self.fill(out[expert, at : at + share], keys[expert], 1, shard.spans)
                    at += share
                else:
                    mine = _within(shard.spans if shard.dim == 1 else (range(rows),), number * share, share)
                    at = self.fill(out[expert], keys[expert], 0, mine, at)
        return out

    def converted(self, name: str, source: Source) -> None:
        """Whatever transformers' converter makes of whole tensors, cut to this rank's part."""
        converter = copy.deepcopy(source.converter)
        for pattern, keys in source.keys.items():
            for key in keys:
                converter.add_tensor(name, key, pattern, lambda key=key: self.whole(key))
        for made, value in converter.convert(name, model=self.model, config=self.model.config).items():
            tensor = value[0] if isinstance(value, list) else value
            if made in self.declared:
                parameter = self.declared[made]
                shard = shard_of(parameter)
                if getattr(parameter, "transposed", False):
                    tensor = tensor.T
                self.put(made, shard.take(tensor).to(self.device, parameter.dtype))
        if name not in self.done:
            raise CheckpointError(f"{self.checkpoint.where}: nothing there makes {name!r}")

    def whole(self, key: str) -> Tensor:
        entry = self.checkpoint.tensors[key]
        out = torch.empty(entry.shape)
        entry.check_dtype()
        self.fill(out, key, 0, (range(entry.shape[0]),) if entry.shape else ())
        return out


def _within(spans: tuple[range, ...], start: int, size: int) -> tuple[range, ...]:
    """The parts of ``spans`` inside ``size`` rows from ``start``, counted from there."""
    cut = (range(max(s.start, start) - start, min(s.stop, start + size) - start) for s in spans)
    return tuple(s for s in cut if len(s))
