"""Preparing tensors to be copied: checked, dense and flat."""

from __future__ import annotations

import torch
from torch import Tensor

from multicard.errors import UnsupportedError

VIEWS = 256
"""Number of cached views of shared memory. Making one costs more than a small copy; decoding needs only a few."""


def check(*tensors: Tensor) -> None:
    """Refuse tensors that aren't dense and on the CPU."""
    for x in tensors:
        if not x.is_cpu or x.layout != torch.strided or x.is_quantized:
            raise UnsupportedError(
                f"backend shm is for dense CPU tensors, not {x.layout} {x.dtype} on {x.device}: "
                "use a group with a backend for that device"
            )


def check_writable(*tensors: Tensor) -> None:
    """Refuse to write into tensors whose elements share memory (``expand``)."""
    for x in tensors:
        if x.is_contiguous():
            continue
        if any(stride == 0 and n > 1 for stride, n in zip(x.stride(), x.shape, strict=True)):
            raise UnsupportedError(
                f"can't write into a tensor of shape {tuple(x.shape)} and strides {x.stride()}, whose elements share "
                "memory: clone it first"
            )


def plain(x: Tensor) -> Tensor:
    """``x``, detached from autograd."""
    return x.detach() if x.requires_grad else x


def dense(x: Tensor) -> Tensor:
    """``x`` with its elements contiguous in memory, conjugation and sign applied; ``x`` itself if they are."""
    return plain(x).contiguous().resolve_conj().resolve_neg()


def flatten(x: Tensor) -> Tensor:
    """The elements of ``x`` in one dimension, for reading."""
    return dense(x).view(-1)


class Flat:
    """A tensor's elements in one dimension, for writing. If this needs a copy, leaving the context writes it back."""

    def __init__(self, tensor: Tensor, write: bool = True) -> None:
        if write:
            check_writable(tensor)
        self._origin = plain(tensor)
        self._dense = dense(self._origin)
        self._write = write and self._dense is not self._origin
        self.flat = self._dense.view(-1)

    def finish(self) -> None:
        if self._write:
            self._origin.copy_(self._dense)

    def __enter__(self) -> Tensor:
        return self.flat

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.finish()


def about(x: Tensor) -> str:
    return f"{x.numel()} × {x.dtype}"
