"""Hashes of arbitrary values: equal on two ranks if and only if the values are, up to hash collisions.

A value is decomposed into text and tensors. In main memory the hash is XXH3. Tensors on a card are hashed there, by
multilinear hashing of their 32-bit words modulo 2^64 (Lemire and Kaser, arXiv 1202.4961): two different tensors of one
shape have the same hash with a probability of 2^-32.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

PLAIN = (type(None), bool, int, str, bytes, slice, range, enum.Enum, torch.dtype, torch.Size)
"""Values that their ``repr`` describes completely."""

NUMPY_HAS = frozenset(
    [torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
)

WINDOW = 1 << 15
"""Words that a card multiplies at once. A longer tensor is hashed window by window, and then the sums are hashed."""


@dataclasses.dataclass
class Description:
    """A decomposed value: everything that isn't in a tensor as text, and the tensors in order."""

    parts: list[str] = dataclasses.field(default_factory=list)
    tensors: list[Tensor] = dataclasses.field(default_factory=list)

    def hash_here(self, *more: str) -> int:
        """The hash of the text, of ``more``, and of the tensors in main memory: a signed 64-bit number."""
        hasher = xxhash.xxh3_64("\x1f".join((*more, *self.parts)).encode("utf-8", "surrogatepass"))
        for t in self.tensors:
            if t.is_cpu:
                hasher.update(_buffer(t))
        number: int = hasher.intdigest()
        return number - (1 << 63)

    def hash_there(self) -> Tensor | None:
        """The hash of the tensors on a card: a 0-dimensional int64 there; None if there are none."""
        hashes = [hash_tensor(t) for t in self.tensors if not t.is_cpu]
        return hash_tensor(torch.stack(hashes)) if hashes else None

    def summary(self) -> str:
        """A description to read: at most 90 characters, with a tensor's first numbers."""
        words = " ".join(self.parts)
        for t in self.tensors[:1]:
            words += f" starting with {t.flatten()[:3].tolist()}"
        return words if len(words) <= 90 else words[:87] + "..."


def describe(value: Any) -> Description:
    """``value`` decomposed: objects of unknown types by their class, functions by name, devices by type."""
    found = Description()
    _describe(value, found)
    return found


def hash_tensor(t: Tensor) -> Tensor:
    """The hash of a tensor's bytes in order, not of its shape or dtype: a 0-dimensional int64 on its device."""
    words = _words(t)
    while True:
        if len(words) > WINDOW and len(words) % WINDOW:
            words = torch.nn.functional.pad(words, (0, -len(words) % WINDOW))
        windows = words.view(-1, min(len(words), WINDOW)) if len(words) else words.new_zeros(1, 1)
        sums = (windows * _multipliers(t.device)[: windows.shape[1]]).sum(1)
        if len(sums) == 1:
            return sums[0]
        words = sums.view(torch.int32)


def _buffer(t: Tensor) -> Any:
    """The memory of a tensor on the CPU, in the order of its elements."""
    t = t.detach().contiguous()
    return (t if t.dtype in NUMPY_HAS else _bytes(t)).numpy()


def _bytes(t: Tensor) -> Tensor:
    flat = t.detach().contiguous().view(-1)
    if t.numel() == 1:  # it may have any stride
        flat = flat.as_strided((1,), (1,))
    return flat.view(torch.uint8)


def _words(t: Tensor) -> Tensor:
    """``(n,)`` int32: the bytes of ``t``, padded with zeros to a whole number of words."""
    data = _bytes(t)
    if len(data) % 4 or data.storage_offset() % 4:
        data = torch.nn.functional.pad(data, (0, -len(data) % 4)).clone()
    return data.view(torch.int32)


@functools.cache
def _multipliers(device: torch.device) -> Tensor:
    numbers = np.random.Generator(np.random.PCG64(20261124)).integers(-(1 << 63), (1 << 63) - 1, WINDOW)
    with torch.inference_mode(False):  # cached, so also used outside the inference mode of the first call
        return torch.from_numpy(numbers).to(device)


def _describe(value: Any, found: Description) -> None:
    if isinstance(value, Tensor):
        _describe_tensor(value, found)
    elif isinstance(value, PLAIN):
        found.parts.append(repr(value))
    elif isinstance(value, (float, complex, np.generic)):
        found.parts.append(f"{type(value).__name__} {value!r}")
    elif isinstance(value, np.ndarray) and value.dtype.kind in "fiubc":
        _describe_tensor(torch.from_numpy(np.ascontiguousarray(value)), found)
    elif isinstance(value, torch.Generator):
        found.parts.append(f"Generator on {value.device.type}")
        _describe_tensor(value.get_state(), found)
    else:
        _describe_container(value, found)


def _describe_tensor(t: Tensor, found: Description) -> None:
    found.parts.append(f"{str(t.dtype).removeprefix('torch.')}{tuple(t.shape)} on {t.device.type}")
    if t.layout is torch.strided and not t.is_meta and not t.is_quantized:
        found.tensors.append(t)


def _describe_container(value: Any, found: Description) -> None:
    children: Any = ()
    if isinstance(value, Mapping):
        children = [part for key in sorted(value, key=repr) for part in (key, value[key])]
    elif isinstance(value, list | tuple | np.ndarray):
        children = list(value)
    elif isinstance(value, set | frozenset):
        children = sorted(map(repr, value))
    elif isinstance(value, os.PathLike | torch.device):
        children = [value.type if isinstance(value, torch.device) else str(value)]
    elif hasattr(value, "tobytes") and hasattr(value, "mode"):  # a PIL picture
        children = [value.mode, np.asarray(value)]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        children = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif callable(getattr(value, "to_dict", None)) and not isinstance(value, type):  # transformers' configs
        children = [value.to_dict()]
    elif callable(getattr(value, "get_seq_length", None)):  # a cache: its tensors may be shards
        children = [value.get_seq_length()]
    kind = value if callable(value) and hasattr(value, "__qualname__") else type(value)
    found.parts.append(f"{kind.__module__}.{kind.__qualname__}[")
    for child in children:
        _describe(child, found)
    found.parts.append("]")
