"""The tensors of a GGUF file, or of the parts of a split one, read and dequantised by slices."""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any

import torch
from torch import Tensor

from multicard.errors import CheckpointError, UnsupportedError
from multicard.quantized.words import dequantize
from multicard.values import is_whole
from multicard.weights.files import STAGING, OpenFiles
from multicard.weights.gguf.header import Entry, Header, read_header

PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)")
MOST_PARTS = 9999
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GGUFFiles(OpenFiles):
    """All tensors of a GGUF file; of all parts, if it is the first of several. Fulfils ``TensorFiles``.

    Attributes:
        metadata: of the file, or of the first part: values by key.

    Raises:
        CheckpointError: a file is missing, truncated, damaged or isn't GGUF; parts that don't belong together.
        UnsupportedError: a version, byte order or tensor type that can't be read; another part than the first.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.where = pathlib.Path(path)
        header = read_header(self.where)
        self.metadata: dict[str, Any] = header.metadata
        self.files = _parts(self.where, header)
        self.tensors: dict[str, Entry] = {}
        for number, file in enumerate(self.files):
            part = read_header(file) if number else header
            _check_part(file, part, number, len(self.files))
            for entry in part.tensors:
                if entry.name in self.tensors:
                    raise CheckpointError(f"{file}: {entry.name!r} is in {self.tensors[entry.name].path.name} too")
                self.tensors[entry.name] = entry
        stated = self.metadata.get("split.tensors.count", len(self.tensors))
        if stated != len(self.tensors):
            raise CheckpointError(f"{self.where}: {len(self.tensors)} tensors in all parts, and it says {stated}")

    def read(self, name: str, dim: int, rows: range, out: Tensor) -> tuple[int, int]:
        if not out.numel():
            return 0, 0
        entry = self.tensors[name]
        lines, columns = _slice(entry, dim, rows)
        target = out if out.dim() == 2 else out[None]
        tall, done, staging = max(1, STAGING // (4 * len(columns))), 0, 0
        for start in range(0, len(lines), tall):
            raw, inside = self.blocks(name, lines[start : start + tall], columns)
            kind = entry.kind.name
            wide = dequantize(kind, raw) if entry.quantized else raw.view(PLAIN[kind]).flatten(1)
            target[start : start + tall].copy_(wide[:, inside.start : inside.stop])
            done += raw.nbytes
            staging = max(staging, raw.nbytes + (wide.nbytes if entry.quantized else 0))
        return done, staging

    def blocks(self, name: str, lines: range, columns: range) -> tuple[Tensor, range]:
        """The blocks of a matrix that cover ``columns`` of ``lines``, as they are; a tensor of one dimension is a line.

        Returns:
            uint8 ``(lines, blocks, bytes)``, and the range of ``columns`` within these blocks: they may begin and end
            inside a block.
        """
        entry = self.tensors[name]
        elements, size = entry.kind.columns, entry.kind.size
        first, stop, whole = columns.start // elements, -(-columns.stop // elements), entry.shape[-1] // elements
        raw = torch.empty(len(lines), stop - first, size, dtype=torch.uint8)
        begin = entry.offset + (lines.start * whole + first) * size
        held: Any = raw.flatten(1).numpy()
        if stop - first == whole:
            self.fill(entry.path, memoryview(held.reshape(-1)), begin, entry.name)
        else:
            for line in range(len(lines)):
                self.fill(entry.path, memoryview(held[line]), begin + line * whole * size, entry.name)
        return raw, range(columns.start - first * elements, columns.stop - first * elements)


def _slice(entry: Entry, dim: int, rows: range) -> tuple[range, range]:
    """Lines and columns of a tensor as a matrix; one of one dimension is a single line."""
    if len(entry.shape) == 1:
        return range(1), rows
    height, width = entry.shape
    return (rows, range(width)) if dim == 0 else (range(height), rows)


def _parts(path: pathlib.Path, header: Header) -> list[pathlib.Path]:
    """All files of a split one, by its name: ``model-00001-of-00003.gguf`` and so on."""
    count = header.metadata.get("split.count", 1)
    if count == 1:
        return [path]
    if not is_whole(count, 2, MOST_PARTS):
        raise CheckpointError(f"{path}: split.count={count!r}: a whole number from 1 to {MOST_PARTS}")
    number, named = header.metadata.get("split.no"), PART.fullmatch(path.name)
    if named is None or int(named[3]) != count:
        raise CheckpointError(
            f"{path} says that it is a part of {count}: its name has to end in -00001-of-{count:05}.gguf"
        )
    if number != 0 or int(named[2]) != 1:
        raise UnsupportedError(
            f"{path} is part {int(named[2])} of {count}: give the first, {named[1]}-00001-of-{named[3]}.gguf"
        )
    return [path.with_name(f"{named[1]}-{part:05}-of-{named[3]}{named[4]}") for part in range(1, count + 1)]


def _check_part(path: pathlib.Path, part: Header, number: int, count: int) -> None:
    found = part.metadata.get("split.no", 0), part.metadata.get("split.count", 1)
    if found != (number, count):
        raise CheckpointError(
            f"{path} says that it is part {found[0]} of {found[1]}, counted from 0; expected {number} of {count}"
        )
