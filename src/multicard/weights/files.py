"""What every format of weight files offers, and reading files by ``pread``."""

from __future__ import annotations

import hashlib
import os
import pathlib
import stat
from collections.abc import Mapping, Sequence
from typing import Protocol, Self

from torch import Tensor

from multicard.errors import CheckpointError

SUMS = "SHA256SUMS"
STAGING = 8 << 20


class Stored(Protocol):
    """A tensor as a file has it."""

    @property
    def path(self) -> pathlib.Path:
        """The file that it is in."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def quantized(self) -> bool:
        """Whether blocks of its elements share scales, so that it takes more memory once it is read."""

    def check_dtype(self) -> None:
        """Raise CheckpointError where it can't be read as floating-point numbers."""

    def size(self, elements: int) -> int:
        """Bytes that so many of its elements take in the file."""


class TensorFiles(Protocol):
    """The weights of a checkpoint, in one file or several.

    Attributes:
        where: the file, or the index of several, for messages.
        files: all of them.
        tensors: by name.
    """

    where: pathlib.Path
    files: list[pathlib.Path]

    @property
    def tensors(self) -> Mapping[str, Stored]: ...

    def read(self, name: str, dim: int, rows: range, out: Tensor) -> tuple[int, int]:
        """Rows ``rows`` along ``dim`` of a tensor into ``out``, converted to its dtype; nothing else is read.

        Returns:
            the number of bytes read, and the size of the staging buffers.
        """

    def close(self) -> None: ...


class OpenFiles:
    """Files that are opened when they are first read. A context manager, which closes them."""

    def __init__(self) -> None:
        self._open: dict[pathlib.Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def fill(self, path: pathlib.Path, buffer: memoryview, offset: int, what: str) -> None:
        """Read as many bytes as ``buffer`` has. Raises CheckpointError, which says that ``what`` was being read."""
        if path not in self._open:
            self._open[path] = open_regular(path)
        while buffer:
            try:
                got = os.preadv(self._open[path], [buffer], offset)
            except OSError as error:
                raise CheckpointError(f"{path}: {error.strerror} while reading {what}") from None
            if got == 0:
                raise CheckpointError(f"{path} is truncated: it ends at byte {offset}, inside {what}")
            buffer, offset = buffer[got:], offset + got


def open_regular(path: pathlib.Path) -> int:
    """A descriptor to read ``path`` with. Raises CheckpointError where that isn't a file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a named pipe would block
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is not a regular file")
    return descriptor


def verify(files: Sequence[pathlib.Path], rank: int, size: int) -> None:
    """Compare this rank's share of the files with ``SHA256SUMS`` in their folder (as ``sha256sum`` writes it).

    Raises:
        CheckpointError: there is no such list, it lacks a file, or a file's content differs.
    """
    sums = files[0].parent / SUMS
    if not sums.is_file():
        raise CheckpointError(
            f"{sums}: no such file to verify with: make it with `sha256sum *{files[0].suffix} > {SUMS}`"
        )
    lines = [line.split(maxsplit=1) for line in sums.read_text(errors="replace").splitlines()]
    known = {fields[1].lstrip("*").strip(): fields[0] for fields in lines if len(fields) == 2}
    for path in files[rank::size]:
        if path.name not in known:
            raise CheckpointError(f"{sums} has no line for {path.name}")
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from None
        if digest != known[path.name].lower():
            raise CheckpointError(f"{path} is damaged: its SHA-256 is {digest}, and {SUMS} says {known[path.name]}")
