"""Slices of safetensors files (https://github.com/huggingface/safetensors#format), read with ``pread``."""

from __future__ import annotations

import collections
import json
import math
import os
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from multicard.errors import CheckpointError, UnsupportedError
from multicard.weights.files import STAGING, OpenFiles, open_regular
from multicard.weights.folder import folder_path

STORED_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CODE_TYPES = {"I64": torch.int64, "I32": torch.int32, "I8": torch.uint8, "U8": torch.uint8, "F8_E4M3": torch.uint8}
"""Of tensors that aren't plain numbers, but parts of quantised ones: what their bits are read as."""

WIDTHS = {"F64": 8, "I16": 2, "BOOL": 1, **{name: t.itemsize for name, t in (STORED_TYPES | CODE_TYPES).items()}}
LARGEST_HEADER = 100_000_000
MOST_TENSORS = 1 << 17
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""Exceptions that reading damaged JSON may raise."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONVERT = (
    'if you trust it, convert it: python -c "import transformers as t; '
    "t.AutoModelForCausalLM.from_pretrained('{0}').save_pretrained('{0}-safetensors')\""
)
SINGLE, INDEX = "{}.safetensors", "{}.safetensors.index.json"


class Entry(NamedTuple):
    """Where a tensor is: ``offset`` bytes from its file's start."""

    path: pathlib.Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def check_dtype(self) -> None:
        if self.dtype not in STORED_TYPES:
            raise CheckpointError(f"{self.path}: {self.name} is {self.dtype}; readable are {', '.join(STORED_TYPES)}")

    @property
    def quantized(self) -> bool:
        return False

    def size(self, elements: int) -> int:
        return elements * WIDTHS[self.dtype]


class Checkpoint(OpenFiles):
    """All tensors of a folder: one safetensors file, or an index of several. A context manager.

    Args:
        stem: what the names of the files begin with, and after a dot the variant: "model", "model.fp16".

    Raises:
        CheckpointError: a file is missing, truncated, damaged or isn't safetensors; tensors overlap; the index names a
            missing file or tensor.
        UnsupportedError: the folder has pickled weights only.
    """

    def __init__(self, folder: str | os.PathLike[str], stem: str = "model") -> None:
        super().__init__()
        self.folder = pathlib.Path(folder)
        self.tensors: dict[str, Entry] = {}
        self.files, weight_map = _files(self.folder, stem)
        self.where = self.folder / (INDEX if weight_map else SINGLE).format(stem)
        for path in self.files:
            for entry in read_header(path):
                if weight_map is None or weight_map.get(entry.name) == path.name:
                    self.tensors[entry.name] = entry
        for name, file in (weight_map or {}).items():
            if name not in self.tensors:
                raise CheckpointError(f"{self.folder / file}: no tensor {name!r}, which {self.where.name} puts there")

    def read(self, name: str, dim: int, rows: range, out: Tensor) -> tuple[int, int]:
        entry = self.tensors[name]
        entry.check_dtype()
        shape = entry.shape or (1,)
        outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
        width = WIDTHS[entry.dtype]
        run, stride = len(rows) * inner, shape[dim] * inner  # a run of elements from every stride
        if not out.numel():
            return 0, 0
        target = out.view(outer, run) if out.is_contiguous() else out.reshape(outer, run)
        start = entry.offset + rows.start * inner * width
        tall = max(1, STAGING // (run * width))
        wide = run if run * width <= STAGING else STAGING // width
        staging = np.empty((min(tall, outer), wide * width), dtype=np.uint8)
        for row in range(0, outer, tall):
            for column in range(0, run, wide):
                block = target[row : row + tall, column : column + wide]
                count, length = block.shape
                for i in range(count):
                    at = start + ((row + i) * stride + column) * width
                    self.fill(entry.path, memoryview(staging[i])[: length * width], at, entry.name)
                held = torch.from_numpy(staging[:count, : length * width]).view(STORED_TYPES[entry.dtype])
                block.copy_(held)
        if not out.is_contiguous():
            out.copy_(target.view(out.shape))
        return outer * run * width, staging.nbytes

    def rectangle(self, name: str, rows: range, columns: range) -> Tensor:
        """Rows and columns of a matrix as they are stored; a tensor of less than two dimensions is one row."""
        entry = self.tensors[name]
        width = WIDTHS[entry.dtype]
        whole = entry.shape[-1] if entry.shape else 1
        out = torch.empty(len(rows), len(columns), dtype=(STORED_TYPES | CODE_TYPES)[entry.dtype])
        raw: Any = out.view(torch.uint8).numpy()
        begin = entry.offset + (rows.start * whole + columns.start) * width
        if len(columns) == whole:
            self.fill(entry.path, memoryview(raw.reshape(-1)), begin, name)
        else:
            for line in range(len(rows)):
                self.fill(entry.path, memoryview(raw[line]), begin + line * whole * width, name)
        return out


def checkpoint_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """A checkpoint's absolute path; a folder's only safetensors file stands for the folder.

    Raises:
        CheckpointError: a safetensors file without a config beside it, or with other weights.
        UnsupportedError: a pickled file.
    """
    found = folder_path(path)
    if not found.is_file():
        return found
    if found.suffix in PICKLED:
        raise UnsupportedError(f"{found} is pickled, which can run code: {CONVERT.format(found.parent)}")
    if found.suffix != ".safetensors":
        return found
    if not (found.parent / "config.json").is_file():
        raise CheckpointError(f"{found}: there is no config.json beside it; put the model's there")
    if _files(found.parent, "model")[0] != [found]:
        raise CheckpointError(f"{found} isn't all of the weights in {found.parent}: give the folder")
    return found.parent


def _files(folder: pathlib.Path, stem: str) -> tuple[list[pathlib.Path], dict[str, str] | None]:
    name, dot, variant = stem.partition(".")
    index = folder / (f"{name}.safetensors.index.{variant}.json" if dot else INDEX.format(stem))
    if not index.is_file():
        single, others = folder / SINGLE.format(stem), list(folder.glob("*.safetensors"))
        if single.is_file() or (not others and not any(folder.glob("*.bin"))):
            return [single], None
        if not others:
            why = CONVERT.format(folder)
            raise UnsupportedError(f"{folder} holds pickled weights only, which can run code: {why}")
        return [others[0] if len(others) == 1 else single], None  # one file of any name
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except OSError as error:
        raise CheckpointError(f"{index}: {error.strerror}") from None
    except DAMAGE:
        raise CheckpointError(f"{index} is not an index of safetensors files") from None
    for name in names:
        if not re.fullmatch(r"[\w.\-]+", str(name)):
            raise CheckpointError(f"{index} names the file {name!r}, which isn't in its folder")
    return [folder / name for name in names], weight_map


def read_header(path: pathlib.Path) -> list[Entry]:
    """The tensors in a safetensors file's header, checked against the file's size. Raises CheckpointError."""
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if size < 8 or 8 + length > size:
            raise CheckpointError(f"{path} is truncated or not safetensors: {size} bytes, header of {length}")
        if length > LARGEST_HEADER:
            raise CheckpointError(f"{path}: a header of {length} bytes; {LARGEST_HEADER} at most")
        text = os.pread(descriptor, length, 8)
        if (count := text.count(b'"data_offsets"')) > MOST_TENSORS:
            raise CheckpointError(f"{path}: a header of {count} tensors; {MOST_TENSORS} at most")
        header = json.loads(text, object_pairs_hook=_unique)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(each, str) for each in metadata.values()):
            raise TypeError("__metadata__ holds what isn't text")
        entries = [(_entry(path, name, described, 8 + length)) for name, described in header.items()]
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror} while reading its header") from None
    except DAMAGE as error:
        raise CheckpointError(f"{path}: its header is damaged ({type(error).__name__}: {error})") from None
    finally:
        os.close(descriptor)
    _check_layout(path, sorted(entries, key=lambda pair: (pair[0].offset, pair[1])), 8 + length, size)
    return [entry for entry, _ in entries]


def _entry(path: pathlib.Path, name: str, described: dict[str, Any], base: int) -> tuple[Entry, int]:
    """A header's entry, and the offset of the byte after its tensor."""
    dtype, shape, (begin, end) = described["dtype"], _integers(described["shape"]), _integers(described["data_offsets"])
    width = WIDTHS.get(dtype)
    if min((*shape, begin, end - begin)) < 0 or (width is not None and end - begin != math.prod(shape) * width):
        raise CheckpointError(f"{path}: {name} is {dtype} {shape}, which {end - begin} bytes don't fit")
    return Entry(path, name, dtype, shape, base + begin), base + end


def _integers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise TypeError(f"{value!r} where whole numbers are expected")
    return tuple(value)


def _check_layout(path: pathlib.Path, ordered: list[tuple[Entry, int]], start: int, size: int) -> None:
    """Check that tensors fill the file without gaps, as the format requires; otherwise the header is damaged."""
    at = start
    for entry, end in ordered:
        if entry.offset != at:
            kind = "overlaps another tensor" if entry.offset < at else "leaves a gap before it"
            raise CheckpointError(f"{path}: {entry.name} {kind} (byte {entry.offset}, expected {at})")
        at = end
    if at > size:
        raise CheckpointError(f"{path} is truncated: {size} bytes of {at}")
    if at < size:
        raise CheckpointError(f"{path} has {size - at} bytes after its last tensor")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        name, _ = collections.Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{name!r} twice")
    return found
