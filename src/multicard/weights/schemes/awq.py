"""AWQ's packing for matrix products, as AutoAWQ writes it (``quant_method: awq``, ``version: gemm``).

``qweight`` is ``(inputs, outputs / 8)``: eight codes of four bits in an int32 word, of eight outputs the ones numbered
0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on. ``qzeros`` are packed alike, ``(groups, outputs / 8)``; ``scales`` are
``(groups, outputs)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from multicard.errors import CheckpointError
from multicard.weights.checkpoint import Checkpoint, Entry
from multicard.weights.schemes.method import (
    FLOATS,
    Layout,
    Part,
    Rectangles,
    Wanted,
    group_or_none,
    groups_of,
    unpack,
    words_of,
)

BITS, HELD = 4, 8
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word each of eight outputs is."""


@dataclasses.dataclass(frozen=True)
class Awq:
    """See this module.

    Attributes:
        size: of a group; -1: a row is one.
    """

    size: int

    @property
    def group(self) -> int | None:
        return None if self.size < 0 else self.size

    @property
    def more(self) -> frozenset[str]:
        return frozenset()

    def tensors(self, shape: tuple[int, int]) -> Mapping[str, Wanted]:
        outputs, inputs = shape
        groups = 1 if self.size < 0 else inputs // self.size
        return {
            "qweight": Wanted((inputs, outputs // HELD), ("I32",)),
            "qzeros": Wanted((groups, outputs // HELD), ("I32",)),
            "scales": Wanted((groups, outputs), FLOATS),
        }

    def layout(self, entries: Mapping[str, Entry], shape: tuple[int, int]) -> Layout:
        return Layout("U4", group_or_none(self.size, shape[1]), entries["scales"].dtype, zero=True)

    def check(self, files: Checkpoint, module: str, shape: tuple[int, int]) -> None:
        outputs, inputs = shape
        if outputs % HELD or inputs % max(self.size, 1):
            raise CheckpointError(
                f"{files.where}: {module} of shape {shape} can't be AWQ's: outputs are multiples of {HELD}, inputs of "
                f"the group's size, {self.size}"
            )

    def read(self, reader: Rectangles, module: str, shape: tuple[int, int], rows: range, columns: range) -> Part:
        groups, held = groups_of(columns, group_or_none(self.size, shape[1])), words_of(rows, BITS)
        codes = in_order(reader.rectangle(f"{module}.qweight", columns, held), rows)
        zeros = in_order(reader.rectangle(f"{module}.qzeros", groups, held), rows)
        return Part(codes.T, reader.rectangle(f"{module}.scales", groups, rows).T, zeros.T)


def in_order(words: Tensor, outputs: range) -> Tensor:
    """The numbers of words that hold ``outputs``, ``(rows, outputs)``."""
    whole = range(outputs.start // HELD * HELD, -(-outputs.stop // HELD) * HELD)
    found = unpack(words, BITS, whole).unflatten(1, (-1, HELD))[..., PLACES].flatten(1)
    first = outputs.start - whole.start
    return found[:, first : first + len(outputs)]
