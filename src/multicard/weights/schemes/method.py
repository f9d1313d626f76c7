"""How a matrix is packed: what every scheme's own module tells of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from multicard.weights.checkpoint import Checkpoint, Entry

FLOATS = ("F16", "BF16", "F32")


class Wanted(NamedTuple):
    """What a tensor of a packed matrix has to be."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


class Part(NamedTuple):
    """Rows and columns of a matrix whose numbers are ``scale * (code - zero)``.

    Attributes:
        codes: their bits, uint8 ``(rows, columns)``.
        scales: ``(rows, groups of these columns)``, in the dtype of the file.
        zeros: their bits, uint8, the same shape; None: none are stored.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """What blocks have to hold of a matrix.

    Attributes:
        codes: a key of ``quantized.scaled.WIDTHS``.
        group: adjacent columns with one scale; None: a row has one.
        scale: a key of ``quantized.scaled.SCALES``.
        zero: scales have zeros.
    """

    codes: str
    group: int | None
    scale: str
    zero: bool


class Rectangles(Protocol):
    """Reads parts of matrices, and counts bytes: :class:`multicard.weights.source.Reader`."""

    def rectangle(self, key: str, rows: range, columns: range) -> Tensor: ...


class Method(Protocol):
    """How a module's matrix, ``(outputs, inputs)``, is packed: in tensors ``module.leaf``."""

    @property
    def group(self) -> int | None:
        """Adjacent columns with one scale, for a matrix that has so many."""

    @property
    def more(self) -> frozenset[str]:
        """Leaves that may be there too."""

    def tensors(self, shape: tuple[int, int]) -> Mapping[str, Wanted]:
        """What has to be there, by leaf."""

    def layout(self, entries: Mapping[str, Entry], shape: tuple[int, int]) -> Layout:
        """What blocks hold of it, given its tensors by leaf."""

    def check(self, files: Checkpoint, module: str, shape: tuple[int, int]) -> None:
        """Look at what can't be told by shapes. Raises CheckpointError or UnsupportedError."""

    def read(self, reader: Rectangles, module: str, shape: tuple[int, int], rows: range, columns: range) -> Part:
        """A part of the matrix; either ``rows`` or ``columns`` are all, and columns begin with a group."""


def unpack(words: Tensor, bits: int, numbers: range) -> Tensor:
    """Numbers of so many bits from int32 words, the lowest first: uint8 ``(rows, len(numbers))``.

    Args:
        words: ``(rows, words)``; the first begins with the last multiple of a word up to ``numbers.start``.
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    found = ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(1)
    first = numbers.start % (32 // bits)
    return found[:, first : first + len(numbers)]


def words_of(numbers: range, bits: int) -> range:
    """The words that hold these numbers."""
    held = 32 // bits
    return range(numbers.start // held, -(-numbers.stop // held))


def groups_of(columns: range, group: int | None) -> range:
    """The groups that columns are in, of which the first begins with one."""
    return range(1) if group is None else range(columns.start // group, -(-columns.stop // group))


def signed(codes: Tensor) -> Tensor:
    """The bits of ``code - 128`` from those of codes 0 to 255."""
    return codes ^ 128


def group_or_none(group: int, inputs: int) -> int | None:
    """A group size, where a row has more than one group."""
    return None if group < 0 or group >= inputs else group
