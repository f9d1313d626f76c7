"""Communication between a caller and its ranks: messages through pipes, never through a socket.

A message is a JSON header and cloudpickle parts. Tensors and arrays are sent outside the pickle as raw bytes (pickle
protocol 5), so neither ``torch.save`` nor ``torch.load`` is called, and no large value is copied into a pickle first.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import os
import pickle
import struct
import sys
import types
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import cloudpickle

if TYPE_CHECKING:
    import torch

_LENGTH = struct.Struct("<I")
_CHUNK = 1 << 20
_LONGEST_HEADER = 1 << 24


@dataclasses.dataclass(frozen=True)
class Message:
    """``kind`` is its type, ``call`` the number of the call it belongs to; ``parts`` are a pickle and its buffers."""

    kind: str
    call: int
    parts: tuple[Any, ...] = ()

    def load(self) -> Any:
        """The sent value."""
        return pickle.loads(self.parts[0], buffers=self.parts[1:])

    def encode(self) -> list[Any]:
        """The bytes to write, in order."""
        views = [memoryview(part).cast("B") for part in self.parts]
        header = json.dumps([self.kind, self.call, [len(view) for view in views]]).encode()
        return [_LENGTH.pack(len(header)) + header, *views]


def pack(kind: str, call: int, value: Any) -> Message:
    """A message with ``value``, which must be picklable (functions of any kind are)."""
    buffers: list[Any] = []
    body = dumps(value, buffers.append)
    return Message(kind, call, (body, *(buffer.raw() for buffer in buffers)))


class Reader:
    """Assembles messages from received bytes."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._large: memoryview | None = None  # what is missing of a large part
        self._messages = self._parse()

    def read(self, fd: int) -> Iterator[Message]:
        """The messages that one read of ``fd`` completes.

        Raises:
            EOFError at the end, BlockingIOError without data, ValueError where something else than messages arrives.
        """
        if self._large is None:
            chunk = os.read(fd, _CHUNK)
            self._buffer += chunk
            count = len(chunk)
        else:
            count = os.readv(fd, [self._large])
            self._large = self._large[count:]
        if not count:
            raise EOFError("the other end of the pipe is closed")
        while (message := next(self._messages)) is not None:
            yield message

    def _parse(self) -> Iterator[Message | None]:
        """Messages in order, and None wherever more bytes have to arrive first."""
        while True:
            (length,) = _LENGTH.unpack((yield from self._take(_LENGTH.size)))
            if length > _LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            kind, call, sizes = json.loads((yield from self._take(length)))
            parts = []
            for size in sizes:
                parts.append((yield from self._take(size)))
            yield Message(kind, call, tuple(parts))

    def _take(self, size: int) -> Generator[None, None, bytearray]:
        """The next ``size`` bytes; large parts are read to where they stay."""
        while len(self._buffer) < size <= _CHUNK:
            yield None
        taken = self._buffer[:size]
        del self._buffer[:size]
        if (there := len(taken)) == size:
            return taken
        large = bytearray(size)
        large[:there] = taken
        self._large = memoryview(large)[there:]
        while self._large:
            yield None
        self._large = None
        return large


def write(fd: int, message: Message) -> None:
    """Write all of ``message`` to a blocking ``fd``."""
    for part in message.encode():
        view = memoryview(part)
        while view:
            view = view[os.write(fd, view[:_CHUNK]) :]


def dumps(value: Any, buffer_callback: Callable[[pickle.PickleBuffer], Any] | None = None) -> bytes:
    """A pickle of ``value``, with the bytes of its tensors inside or passed to ``buffer_callback``."""
    stream = io.BytesIO()
    _Pickler(stream, protocol=5, buffer_callback=buffer_callback).dump(value)
    return stream.getvalue()


class _Pickler(cloudpickle.Pickler):
    """cloudpickle, with tensors as raw bytes and functions with file names. Values on a card arrive on the CPU."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, types.CodeType):  # cloudpickle drops the file name from 3.1.3 on, but call sites need it
            return _code, (obj.co_filename, *self.dispatch_table[types.CodeType](obj))
        if _is_plain_tensor(obj):
            flat = obj.detach().cpu().contiguous().resolve_conj().resolve_neg().reshape(-1)
            # of the array, not of its memoryview: collecting a cycle that contains one crashes CPython 3.11
            buffer = pickle.PickleBuffer(flat.view(sys.modules["torch"].uint8).numpy())
            return _tensor, (buffer, obj.dtype, tuple(obj.shape), obj.requires_grad)
        if isinstance(obj, types.ModuleType) and type(obj) is not types.ModuleType:
            return importlib.import_module, (obj.__name__,)  # lazy modules have their own class
        return super().reducer_override(obj)


def _code(file: str, make: Callable[..., types.CodeType], arguments: tuple[Any, ...]) -> types.CodeType:
    return make(*arguments).replace(co_filename=file)


def _is_plain_tensor(obj: Any) -> bool:
    torch = sys.modules.get("torch")  # if torch isn't imported there is no tensor, and importing it takes seconds
    if torch is None or type(obj) is not getattr(torch, "Tensor", None):
        return False
    return obj.layout == torch.strided and not obj.is_quantized and not obj.is_meta


def _tensor(buffer: Any, dtype: torch.dtype, shape: tuple[int, ...], requires_grad: bool) -> torch.Tensor:
    import numpy
    import torch

    data = numpy.frombuffer(buffer, dtype=numpy.uint8)
    if not data.flags.writeable:
        data = data.copy()
    return torch.from_numpy(data).view(dtype).reshape(shape).requires_grad_(requires_grad)
