"""LoRA adapters in peft's folders, added to the weights of our own decoder as they are read: ``W + scale · B A``.

So answers are those of peft's ``merge_and_unload``, at the speed of the model without adapters. Each rank reads only
its slices of A and B. The sum is computed in float32 and rounded once, to the dtype of the weight.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from multicard.errors import CheckpointError, UnsupportedError
from multicard.layers.shard import Shard, Spans, count
from multicard.weights import Checkpoint, Plain, Source, SourceOf
from multicard.weights.folder import read_json
from multicard.weights.source import Reader, Shapes

CONFIG, STEM = "adapter_config.json", "adapter_model"
TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")
NAME = re.compile(r"\^?([\w.]+)\$?")

ANY = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
    "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
"""Settings of a config that may have any value: those that are read here, and those that matter to training alone."""
PLAIN = {"bias": ("none",), "init_lora_weights": (True, False, None, "gaussian", "eva")}
"""Settings that must have one of these values. All others, also those of later releases, must be off."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One adapter's folder.

    Attributes:
        checkpoint: its tensors; open while it is read.
        scales: by the base model's tensor, for example "model.layers.0.self_attn.q_proj.weight".
    """

    checkpoint: Checkpoint
    scales: Mapping[str, float]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Adapter:
        """Read its config and the header of its file.

        Raises:
            CheckpointError: a file that is missing or damaged, or a pair of tensors that don't fit each other.
            UnsupportedError: it isn't a plain LoRA; the message names the setting or the tensor.
        """
        path = pathlib.Path(folder)
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such folder of a LoRA adapter")
        config = read_json(path, CONFIG)
        _check_config(path / CONFIG, config)
        checkpoint = Checkpoint(path, STEM)
        modules: dict[str, set[str]] = {}
        for name, entry in checkpoint.tensors.items():
            entry.check_dtype()
            match = TENSOR.fullmatch(name)
            if match is None or len(entry.shape) != 2:
                raise UnsupportedError(f"{entry.path}: {name} isn't a LoRA matrix of a linear layer, A or B")
            modules.setdefault(match[1], set()).add(match[2])
        for module, sides in modules.items():
            if sides != {"A", "B"}:
                raise CheckpointError(f"{path}: {module} has a LoRA matrix {sides.pop()} and not the other one")
        found = cls(checkpoint, {f"{module}.weight": _scale(path, config, module) for module in modules})
        for module in modules:
            held = checkpoint.tensors[found.entries(f"{module}.weight")[0]].shape[0]
            if held != (rank := _of_module(path, config, "rank_pattern", module, config.get("r"))):
                raise CheckpointError(f"{path}: the LoRA of {module} has rank {held}, and {CONFIG} says {rank}")
        return found

    def entries(self, key: str) -> tuple[str, str]:
        """The names of the matrices A and B for a tensor of the base model."""
        module = key.removesuffix(".weight")
        return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"

    def check(self, base: Checkpoint, adaptable: set[str]) -> None:
        """Check that the adapter is one for the model of ``base``.

        Args:
            adaptable: the matrices that adapters may change.

        Raises:
            CheckpointError: it is for another model.
        """
        for key in self.scales:
            (rank, width), (height, depth) = (self.checkpoint.tensors[name].shape for name in self.entries(key))
            found = base.tensors[key].shape if key in adaptable else "no such linear layer"
            if found != (height, width) or rank != depth:
                raise CheckpointError(
                    f"{self.checkpoint.folder}: an adapter of another model: for {key} of shape {(height, width)} by "
                    f"ranks {rank} and {depth}, where {base.folder} has {found}"
                )

    def add(self, key: str, dim: int, spans: Spans, part: Tensor, counted: Reader) -> None:
        """Add the adapter's product to this rank's part of one of the model's tensors, in float32.

        Args:
            dim: the dimension along which ``part`` is ``spans`` of the whole.
            counted: counts the bytes that are read.
        """
        if key not in self.scales or not count(spans):
            return
        reader, (name_a, name_b) = Reader(self.checkpoint), self.entries(key)
        a = self._read(reader, name_a, 1, spans if dim == 1 else None, part.device)
        b = self._read(reader, name_b, 0, spans if dim == 0 else None, part.device)
        part.addmm_(b, a, alpha=self.scales[key])
        counted.bytes_read += reader.bytes_read
        counted.staging = max(counted.staging, reader.staging + a.nbytes + b.nbytes)

    def _read(self, reader: Reader, name: str, dim: int, spans: Spans | None, device: torch.device) -> Tensor:
        """Slices of a matrix along ``dim``, or all of it."""
        shape = self.checkpoint.tensors[name].shape
        shard = Shard(shape, dim, (range(shape[dim]),) if spans is None else spans)
        out = torch.empty(shard.local_shape, device=device)
        reader.spans(name, dim, shard.spans, out)
        return out


class Adapted:
    """A source whose tensors adapters are added to."""

    def __init__(self, plain: Plain, adapters: Sequence[Adapter]) -> None:
        self._plain, self._adapters = plain, adapters

    def shapes(self, shard: Shard) -> Shapes:
        return self._plain.shapes(shard)

    def fill(self, reader: Reader, name: str, shard: Shard, out: Tensor) -> None:
        slices = self._plain.slices(shard)
        if not any(key in adapter.scales for key, _ in slices for adapter in self._adapters):
            self._plain.fill(reader, name, shard, out)
            return
        wide = out if out.dtype == torch.float32 else torch.empty(out.shape, device=out.device)
        self._plain.fill(reader, name, shard, wide)
        at = 0
        for key, spans in slices:
            part = wide.narrow(shard.dim, at, count(spans))
            at += count(spans)
            for adapter in self._adapters:
                adapter.add(key, shard.dim, spans, part, reader)
        if wide is not out:
            out.copy_(wide)


def adapted(source_of: SourceOf, adapters: Sequence[Adapter]) -> SourceOf:
    """The sources with the adapters' products added; without adapters the same."""

    def source(name: str) -> Source | None:
        plain = source_of(name)
        return Adapted(plain, adapters) if isinstance(plain, Plain) else plain

    return source if adapters else source_of


@contextlib.contextmanager
def adapters(folders: Sequence[str | os.PathLike[str]]) -> Iterator[list[Adapter]]:
    """The adapters of these folders, whose files are closed at the end. Raises as :meth:`Adapter.open`."""
    with contextlib.ExitStack() as stack:
        found = [Adapter.open(folder) for folder in folders]
        for adapter in found:
            stack.enter_context(adapter.checkpoint)
        yield found


def _check_config(path: pathlib.Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise UnsupportedError(f"{path}: peft_type={config.get('peft_type')!r}; only LORA is read")
    for setting, value in config.items():
        allowed = PLAIN.get(setting)
        off = value in (None, False, "", 0) or value == [] or value == {}
        if setting not in ANY and (not off if allowed is None else value not in allowed):
            raise UnsupportedError(
                f"{path}: {setting}={value!r}, which isn't plain LoRA: merge it with peft (merge_and_unload) and save "
                "the model"
            )


def _scale(path: pathlib.Path, config: Mapping[str, Any], module: str) -> float:
    """``alpha / r``, or with rank-stabilised LoRA ``alpha / √r``; either may have a value of its own for a module."""
    rank = _of_module(path, config, "rank_pattern", module, config.get("r"))
    alpha = _of_module(path, config, "alpha_pattern", module, config.get("lora_alpha"))
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(
            f"{path / CONFIG}: r={rank!r} and lora_alpha={alpha!r} for {module}: numbers, r from 1 on"
        )
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _of_module(path: pathlib.Path, config: Mapping[str, Any], setting: str, module: str, default: Any) -> Any:
    """A pattern's value for ``module``: the first whose name is the end of the module's path."""
    patterns = config.get(setting) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{path / CONFIG}: {setting}={patterns!r}: must be an object")
    for pattern, value in patterns.items():
        name = NAME.fullmatch(pattern)
        if name is None:
            raise UnsupportedError(f"{path / CONFIG}: {setting} has the pattern {pattern!r}; only plain names are read")
        if module == name[1] or (pattern[0] != "^" and module.endswith(f".{name[1]}")):
            return value
    return default
