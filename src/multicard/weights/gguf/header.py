"""A GGUF file's header: metadata and a list of tensors, every length checked against the file's size.

A file is: "GGUF", version, number of tensors, number of metadata values; the values (key, type, value); the tensors
(name, dimensions, type, offset); and, aligned, their data. Numbers are little-endian.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import pathlib
import struct
from typing import Any, NamedTuple

import numpy as np

from multicard.errors import CheckpointError, UnsupportedError
from multicard.quantized.types import BlockType
from multicard.weights.files import open_regular
from multicard.weights.gguf.types import READABLE, REFUSED

MAGIC = b"GGUF"
VERSIONS = (2, 3)
LARGEST_HEADER, LONGEST_NAME = 1 << 28, 1 << 16  # bytes
MOST_VALUES, MOST_TENSORS, MOST_ITEMS = 1 << 16, 1 << 17, 1 << 24
MOST_DIMENSIONS = 4
PIECE = 1 << 20  # bytes of the header that are read at once
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""struct's letters for the types of metadata values."""
STRING, ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor is: ``offset`` bytes from its file's start. Blocks run along its last dimension."""

    path: pathlib.Path
    name: str
    kind: BlockType
    shape: tuple[int, ...]
    offset: int

    @property
    def quantized(self) -> bool:
        return self.kind.groups is not None

    def check_dtype(self) -> None:
        """All types in READABLE can be read."""

    def size(self, elements: int) -> int:
        return elements * self.kind.size // self.kind.columns

    @property
    def stop(self) -> int:
        """The offset of the byte after it."""
        return self.offset + self.size(math.prod(self.shape))


class Header(NamedTuple):
    """A file's metadata by key, and its tensors."""

    metadata: dict[str, Any]
    tensors: list[Entry]


def read_header(path: pathlib.Path) -> Header:
    """The header of a GGUF file.

    Raises:
        CheckpointError: it isn't GGUF, or it is truncated or damaged.
        UnsupportedError: a version, byte order or tensor type that can't be read.
    """
    descriptor = open_regular(path)
    try:
        return _Reader(path, descriptor).header()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror} while reading its header") from None
    finally:
        os.close(descriptor)


class _Reader:
    """Reads a header from its beginning to its end."""

    def __init__(self, path: pathlib.Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor
        self._size = os.fstat(descriptor).st_size
        self._piece, self._at, self._read = b"", 0, 0  # what was read last, the place in it, and the offset after it

    def header(self) -> Header:
        self._check_version()
        tensors, values = self._number("Q"), self._number("Q")
        if values > MOST_VALUES or tensors > MOST_TENSORS:
            raise self._damaged(f"{values} values and {tensors} tensors; {MOST_VALUES} and {MOST_TENSORS} at most")
        metadata: dict[str, Any] = {}
        for _ in range(values):
            key = self._text(LONGEST_NAME)
            if key in metadata:
                raise self._damaged(f"the key {key!r} twice")
            metadata[key] = self._value(self._number("I"))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment not in (1 << power for power in range(3, 21)):
            raise self._damaged(f"general.alignment {alignment!r}, not a power of 2 from 8 to {1 << 20}")
        entries = [self._entry() for _ in range(tensors)]
        begin = _aligned(self._offset, alignment)
        found = [dataclasses.replace(entry, offset=begin + entry.offset) for entry in entries]
        self._check_layout(found, begin, alignment)
        return Header(metadata, found)

    def _check_version(self) -> None:
        magic = self._take(4) if self._size >= 4 else b""
        if magic != MAGIC:
            raise CheckpointError(f"{self._path} is not a GGUF file: it begins with {magic!r}, not {MAGIC!r}")
        version = self._number("I")
        if version not in VERSIONS:
            turned = int.from_bytes(version.to_bytes(4, "big"), "little") in (1, *VERSIONS)
            what = "is big-endian" if turned else f"is GGUF version {version}"
            raise UnsupportedError(f"{self._path} {what}: readable are little-endian files of version 2 and 3")

    def _value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self._numbers(kind, 1)[0]
        if kind == STRING:
            return self._text()
        if kind != ARRAY:
            raise self._damaged(f"a value of type {kind}")
        inner, count = self._number("I"), self._number("Q")
        if inner not in NUMBERS and inner != STRING:
            raise self._damaged(f"an array of values of type {inner}")
        width = 8 if inner == STRING else struct.calcsize(NUMBERS[inner])
        if count > MOST_ITEMS or count * width > self._size - self._offset:
            raise self._damaged(f"an array of {count} values in a file of {self._size} bytes")
        return [self._text() for _ in range(count)] if inner == STRING else self._numbers(inner, count)

    def _numbers(self, kind: int, count: int) -> list[Any]:
        letter = NUMBERS[kind]
        found = np.frombuffer(
            self._take(count * struct.calcsize(letter)), np.dtype(letter.replace("?", "B")).newbyteorder("<")
        )
        if kind == 7:
            if (found > 1).any():
                raise self._damaged("a truth value other than 0 and 1")
            found = found.astype(bool)
        return found.tolist()

    def _entry(self) -> Entry:
        """A tensor, with its offset from the beginning of the data."""
        name, count = self._text(LONGEST_NAME), self._number("I")
        if not 1 <= count <= MOST_DIMENSIONS:
            raise self._damaged(f"{name!r} has {count} dimensions; 1 to {MOST_DIMENSIONS} are possible")
        shape = tuple(self._number("Q") for _ in range(count))[::-1]  # the file has the last one first
        number, offset = self._number("I"), self._number("Q")
        if number not in READABLE:
            kind = REFUSED.get(number, f"of the unknown type {number}")
            readable = ", ".join(kind.name for kind in READABLE.values())
            raise UnsupportedError(f"{self._path}: {name!r} is {kind}; readable are {readable}")
        found = Entry(self._path, name, READABLE[number], shape, offset)
        if min(shape) < 1 or math.prod(shape) > 1 << 60 or offset > self._size:
            raise self._damaged(f"{name!r} has shape {shape} at {offset}, in a file of {self._size} bytes")
        if shape[-1] % found.kind.columns:
            raise self._damaged(f"{name!r} has rows of {shape[-1]}, and blocks of {found.kind.columns} elements")
        return found

    def _check_layout(self, tensors: list[Entry], begin: int, alignment: int) -> None:
        """Check that tensors fill the rest of the file, each at the first aligned byte after the one before it."""
        for name, count in collections.Counter(entry.name for entry in tensors).most_common(1):
            if count > 1:
                raise self._damaged(f"the tensor {name!r} twice")
        at = begin if tensors else self._offset  # a first part may have none, and then no bytes up to where they begin
        for entry in sorted(tensors, key=lambda entry: (entry.offset, entry.stop)):
            if entry.offset != (expected := _aligned(at, alignment)):
                kind = "overlaps another tensor" if entry.offset < at else "isn't where the one before it ends"
                raise self._damaged(f"{entry.name!r} {kind} (byte {entry.offset}, expected {expected})")
            at = entry.stop
        if at > self._size:
            raise CheckpointError(f"{self._path} is truncated: {self._size} bytes of {at}")
        if self._size > _aligned(at, alignment):
            raise CheckpointError(f"{self._path} has {self._size - at} bytes after its last tensor")

    @property
    def _offset(self) -> int:
        """In the file, of the next byte."""
        return self._read - len(self._piece) + self._at

    def _take(self, count: int) -> bytes:
        """The next bytes."""
        if self._at + count > len(self._piece):
            self._read_on(count)
        found = self._piece[self._at : self._at + count]
        self._at += count
        return found

    def _read_on(self, count: int) -> None:
        if self._offset + count > self._size:
            raise CheckpointError(
                f"{self._path} is truncated or damaged: {self._size} bytes, and its header asks for {count} at byte "
                f"{self._offset}"
            )
        if self._offset + count > LARGEST_HEADER:
            raise self._damaged(f"more than {LARGEST_HEADER} bytes")
        rest = self._piece[self._at :]
        while len(rest) < count:
            more = os.pread(self._descriptor, max(PIECE, count - len(rest)), self._read)
            if not more:
                raise CheckpointError(f"{self._path} is truncated: it ends at byte {self._read}, inside its header")
            rest, self._read = rest + more, self._read + len(more)
        self._piece, self._at = rest, 0

    def _number(self, letter: str) -> int:
        return int.from_bytes(self._take(struct.calcsize(letter)), "little")

    def _text(self, longest: int = LARGEST_HEADER) -> str:
        length = int.from_bytes(self._take(8), "little")
        if length > longest:
            raise self._damaged(f"a text of {length} bytes; {longest} at most")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"a text that isn't UTF-8 ({error.reason})") from None

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: its header is damaged: {why}")


def _aligned(offset: int, alignment: int) -> int:
    """The first multiple of ``alignment`` from ``offset`` on."""
    return -(-offset // alignment) * alignment
