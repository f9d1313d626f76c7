"""8-bit weights as bitsandbytes writes them (``quant_method: bitsandbytes`` with ``load_in_8bit``, arXiv 2208.07339).

``weight`` is int8, and ``SCB`` has the largest size of each row, so numbers are ``weight * SCB / 127``. The package's
own product also rounds the inputs that are small; products here don't.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from multicard.errors import UnsupportedError
from multicard.weights.checkpoint import Checkpoint, Entry
from multicard.weights.schemes.method import Layout, Part, Rectangles, Wanted

LARGEST = 127
ROWS = 0
"""Among the values of ``weight_format`` the one for rows as they are; others are orders of some cards."""


@dataclasses.dataclass(frozen=True)
class RowInt8:
    """See this module."""

    @property
    def group(self) -> int | None:
        return None

    @property
    def more(self) -> frozenset[str]:
        return frozenset({"weight_format"})

    def tensors(self, shape: tuple[int, int]) -> Mapping[str, Wanted]:
        return {"weight": Wanted(shape, ("I8",)), "SCB": Wanted(shape[:1], ("F32",))}

    def layout(self, entries: Mapping[str, Entry], shape: tuple[int, int]) -> Layout:
        return Layout("S8", None, "F32", zero=False)

    def check(self, files: Checkpoint, module: str, shape: tuple[int, int]) -> None:
        if (entry := files.tensors.get(f"{module}.weight_format")) is None:
            return
        if (order := int(files.rectangle(entry.name, range(1), range(1))[0, 0])) != ROWS:
            raise UnsupportedError(f"{entry.path}: {entry.name} is {order}, an order of columns that isn't read; 0 is")

    def read(self, reader: Rectangles, module: str, shape: tuple[int, int], rows: range, columns: range) -> Part:
        scales = reader.rectangle(f"{module}.SCB", range(1), rows).T / LARGEST
        return Part(reader.rectangle(f"{module}.weight", rows, columns), scales)
