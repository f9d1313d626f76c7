"""Fine-grained FP8 (``quant_method: fp8``), as DeepSeek's and Qwen3's checkpoints have it.

``weight`` is float8_e4m3fn. Each square of it, 128 outputs by 128 inputs, is multiplied by one of ``weight_scale_inv``.
The scheme's own kernels round inputs to FP8 too; products here don't.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from multicard.weights.checkpoint import Checkpoint, Entry
from multicard.weights.schemes.method import FLOATS, Layout, Part, Rectangles, Wanted, group_or_none, groups_of


@dataclasses.dataclass(frozen=True)
class SquareFp8:
    """See this module.

    Attributes:
        height, width: of a square.
        scale: the leaf of the scales.
    """

    height: int
    width: int
    scale: str = "weight_scale_inv"

    @property
    def group(self) -> int | None:
        return self.width

    @property
    def more(self) -> frozenset[str]:
        return frozenset()

    def tensors(self, shape: tuple[int, int]) -> Mapping[str, Wanted]:
        squares = -(-shape[0] // self.height), -(-shape[1] // self.width)
        return {"weight": Wanted(shape, ("F8_E4M3",)), self.scale: Wanted(squares, FLOATS)}

    def layout(self, entries: Mapping[str, Entry], shape: tuple[int, int]) -> Layout:
        return Layout("E4M3", group_or_none(self.width, shape[1]), entries[self.scale].dtype, zero=False)

    def check(self, files: Checkpoint, module: str, shape: tuple[int, int]) -> None:
        pass

    def read(self, reader: Rectangles, module: str, shape: tuple[int, int], rows: range, columns: range) -> Part:
        groups = groups_of(columns, group_or_none(self.width, shape[1]))
        high = range(rows.start // self.height, -(-rows.stop // self.height))
        scales = reader.rectangle(f"{module}.{self.scale}", high, groups)
        start = rows.start - high.start * self.height
        scales = scales.repeat_interleave(self.height, 0)[start : start + len(rows)]
        return Part(reader.rectangle(f"{module}.weight", rows, columns), scales)
