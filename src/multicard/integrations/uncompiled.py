"""Refusing to be compiled, with our own error.

Marking a function for Dynamo imports it, which takes a second of processor time. So this module is imported only while
code is being traced.
"""

from __future__ import annotations

import torch

from multicard.errors import UnsupportedError

SEQUENCE = (
    "a sequence that is split over ranks can't be compiled: its cache and its slices change with each call. Leave it "
    "uncompiled, or split it by tp alone"
)
ROWS = "pictures whose rows are split over ranks can't be compiled. Leave it uncompiled"
GUIDANCE = (
    "compiled after it was parallelized, it would compute every guidance branch on every rank. Compile it in place, "
    "with its own method compile(), or before mc.parallelize"
)


@torch.compiler.disable(reason="raises")
def refuse(name: str, why: str) -> None:
    """Raise, when the traced code runs: what a traced function itself raises, Dynamo catches."""
    raise UnsupportedError(f"torch.compile of {name}: {why}")
