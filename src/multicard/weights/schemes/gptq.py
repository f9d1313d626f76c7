"""GPTQ's packing, as AutoGPTQ and GPTQModel write it (``quant_method: gptq``).

``qweight`` has codes in int32 words along the inputs, ``(inputs / codes of a word, outputs)``. ``scales`` are
``(groups, outputs)``; ``qzeros`` are packed along the outputs. In the older of two conventions (``gptq``) they are
stored less one, modulo the number of codes. ``g_idx`` has the group of each input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

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
class Gptq:
    """See this module.

    Attributes:
        size: of a group; -1: a row is one.
        less: what zeros are stored less.
        ordered: inputs may be in an order of their own, which ``g_idx`` has to tell.
    """

    bits: int
    size: int
    less: int
    ordered: bool = False

    @property
    def group(self) -> int | None:
        return None if self.size < 0 else self.size

    @property
    def more(self) -> frozenset[str]:
        return frozenset({"g_idx", "bias"})

    def tensors(self, shape: tuple[int, int]) -> Mapping[str, Wanted]:
        outputs, inputs = shape
        groups = 1 if self.size < 0 else -(-inputs // self.size)
        return {
            "qweight": Wanted((len(words_of(range(inputs), self.bits)), outputs), ("I32",)),
            "qzeros": Wanted((groups, len(words_of(range(outputs), self.bits))), ("I32",)),
            "scales": Wanted((groups, outputs), FLOATS),
        }

    def layout(self, entries: Mapping[str, Entry], shape: tuple[int, int]) -> Layout:
        codes = "S8" if self.bits == 8 else f"U{self.bits}"
        return Layout(codes, group_or_none(self.size, shape[1]), entries["scales"].dtype, zero=True)

    def check(self, files: Checkpoint, module: str, shape: tuple[int, int]) -> None:
        """Refuse inputs that aren't in the order of their groups."""
        if (entry := files.tensors.get(f"{module}.g_idx")) is None:
            if self.ordered:
                raise CheckpointError(f"{files.where}: no tensor {f'{module}.g_idx'!r}, which desc_act=true asks for")
            return
        _, inputs = shape
        if entry.shape != (inputs,) or entry.dtype != "I32":
            raise CheckpointError(
                f"{entry.path}: {entry.name} is {entry.dtype} {entry.shape}; expected I32 ({inputs},)"
            )
        found = files.rectangle(entry.name, range(1), range(inputs))[0]
        expected = torch.arange(inputs, dtype=torch.int32) // (inputs if self.size < 0 else self.size)
        if not torch.equal(found, expected):
            raise UnsupportedError(
                f"{entry.path}: {entry.name} has inputs out of the order of their groups (desc_act, act-order), which "
                "isn't read: use a checkpoint with desc_act=false"
            )

    def read(self, reader: Rectangles, module: str, shape: tuple[int, int], rows: range, columns: range) -> Part:
        groups = groups_of(columns, group_or_none(self.size, shape[1]))
        words = reader.rectangle(f"{module}.qweight", words_of(columns, self.bits), rows)
        codes = unpack(words.T.contiguous(), self.bits, columns)
        scales = reader.rectangle(f"{module}.scales", groups, rows).T
        zeros = unpack(reader.rectangle(f"{module}.qzeros", groups, words_of(rows, self.bits)), self.bits, rows)
        zeros = ((zeros + self.less) & ((1 << self.bits) - 1)).T
        return Part(signed(codes), scales, signed(zeros)) if self.bits == 8 else Part(codes, scales, zeros)
