"""Integers and FP8 as compressed-tensors writes them (``quant_method: compressed-tensors``).

``weight_packed`` has codes, plus half of their range, in int32 words along the inputs; or ``weight`` has int8 or
float8_e4m3fn. ``weight_scale`` is ``(outputs, groups)``, ``(outputs, 1)``, or one number. ``weight_zero_point`` has as
many numbers, packed along the outputs where weights are packed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from multicard.errors import CheckpointError, UnsupportedError
from multicard.weights.checkpoint import Checkpoint, Entry
from multicard.weights.schemes.method import (
    FLOATS,
    Layout,
    Part,
    Rectangles,
    Wanted,
    group_or_none,
    groups_of,
    signed,
    unpack,
    words_of,
)


@dataclasses.dataclass(frozen=True)
class Compressed:
    """See this module.

    Attributes:
        codes: U2, U4 or S8: packed; I8 or E4M3: not.
        size: of a group; -1: a row has one scale; 0: the matrix has one, and no zero.
        zero: there are zeros.
    """

    codes: str
    size: int
    zero: bool

    @property
    def packed(self) -> bool:
        return self.codes in ("U2", "U4", "S8")

    @property
    def bits(self) -> int:
        return int(self.codes[1])

    @property
    def group(self) -> int | None:
        return self.size if self.size > 0 else None

    @property
    def more(self) -> frozenset[str]:
        return frozenset({"weight_zero_point"})

    def tensors(self, shape: tuple[int, int]) -> Mapping[str, Wanted]:
        outputs, inputs = shape
        groups = -(-inputs // self.size) if self.size > 0 else 1
        scales = (1,) if self.size == 0 else (outputs, groups)
        found = {"weight_scale": Wanted(scales, FLOATS)}
        if self.packed:
            found["weight_packed"] = Wanted((outputs, len(words_of(range(inputs), self.bits))), ("I32",))
            found["weight_shape"] = Wanted((2,), ("I64", "I32"))
        else:
            found["weight"] = Wanted(shape, ("I8" if self.codes == "I8" else "F8_E4M3",))
        if self.zero:
            high = len(words_of(range(outputs), self.bits)) if self.packed else outputs
            found["weight_zero_point"] = Wanted((high, groups), ("I32" if self.packed else "I8",))
        return found

    def layout(self, entries: Mapping[str, Entry], shape: tuple[int, int]) -> Layout:
        codes = "S8" if self.codes == "I8" else self.codes
        return Layout(codes, self._group(shape), entries["weight_scale"].dtype, self.zero)

    def check(self, files: Checkpoint, module: str, shape: tuple[int, int]) -> None:
        if (entry := files.tensors.get(f"{module}.weight_g_idx")) is not None:
            raise UnsupportedError(
                f"{entry.path}: {entry.name}: inputs are out of the order of their groups (actorder=group), which "
                "isn't read: use a checkpoint with actorder=weight, or without"
            )
        if self.packed:
            entry = files.tensors[f"{module}.weight_shape"]
            if (found := tuple(files.rectangle(entry.name, range(1), range(2))[0].tolist())) != shape:
                raise CheckpointError(f"{entry.path}: {entry.name} says {found} where the config asks for {shape}")
        if not self.zero and (entry := files.tensors.get(f"{module}.weight_zero_point")) is not None:
            raise CheckpointError(f"{entry.path}: {entry.name}, where quantization_config says symmetric: no zeros")

    def read(self, reader: Rectangles, module: str, shape: tuple[int, int], rows: range, columns: range) -> Part:
        groups = groups_of(columns, self._group(shape))
        if self.size:
            scales, zeros = reader.rectangle(f"{module}.weight_scale", rows, groups), None
        else:
            scales, zeros = reader.rectangle(f"{module}.weight_scale", range(1), range(1)).expand(len(rows), 1), None
        if not self.packed:
            codes = reader.rectangle(f"{module}.weight", rows, columns)
            if self.zero:
                zeros = reader.rectangle(f"{module}.weight_zero_point", rows, groups)
            return Part(codes, scales, zeros)
        words = reader.rectangle(f"{module}.weight_packed", rows, words_of(columns, self.bits))
        codes = unpack(words, self.bits, columns)
        if self.zero:
            high = reader.rectangle(f"{module}.weight_zero_point", words_of(rows, self.bits), groups)
            zeros = unpack(high.T.contiguous(), self.bits, rows).T
        if self.codes == "S8":
            return Part(signed(codes), scales, None if zeros is None else signed(zeros))
        return Part(codes, scales, zeros)

    def _group(self, shape: tuple[int, int]) -> int | None:
        return group_or_none(self.size, shape[1]) if self.size else None
