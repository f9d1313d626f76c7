"""Sending a pipeline's output from the ranks to the caller: fields by name, pictures and arrays as tensors.

A job's ranks exchange tensors and plain values only, since nothing is unpickled from a socket.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

MODES = ("L", "RGB", "RGBA")
"""Picture modes that the bytes describe completely."""


def pack(output: Any) -> dict[str, Any]:
    """The fields of a pipeline's output; any other value as the field ``output``."""
    if dataclasses.is_dataclass(output):
        fields = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    else:
        fields = dict(output) if isinstance(output, dict) else {"output": output}
    return {name: _pack(value) for name, value in fields.items()}


def unpack(fields: dict[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`pack`."""
    return {name: _unpack(value) for name, value in fields.items()}


def join(outputs: list[dict[str, Any]]) -> dict[str, Any]:
    """Several batches' unpacked fields as one batch's."""
    return {name: _join([output[name] for output in outputs]) for name in outputs[0]}


def _pack(value: Any) -> Any:
    from PIL import Image

    if isinstance(value, Image.Image) and value.mode in MODES:
        return {"picture": value.mode, "pixels": torch.from_numpy(np.array(value))}
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return {"array": torch.from_numpy(np.ascontiguousarray(value))}
    if isinstance(value, np.generic):
        return value.item()
    return _inside(value, _pack)


def _unpack(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"picture", "pixels"}:
        from PIL import Image

        return Image.fromarray(value["pixels"].numpy())
    if isinstance(value, dict) and value.keys() == {"array"}:
        return value["array"].numpy()
    return _inside(value, _unpack)


def _inside(value: Any, change: Callable[[Any], Any]) -> Any:
    if type(value) in (list, tuple):
        return type(value)(change(item) for item in value)
    if type(value) is dict:
        return {key: change(item) for key, item in value.items()}
    return value


def _join(values: list[Any]) -> Any:
    first = values[0]
    if len(values) == 1:
        return first
    if isinstance(first, Tensor) and first.dim():
        return torch.cat(values)
    if isinstance(first, np.ndarray) and first.ndim:
        return np.concatenate(values)
    return [item for value in values for item in value] if isinstance(first, list) else first
