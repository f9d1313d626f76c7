"""Refusing to be compiled, with our own error.

Marking a function for Dynamo imports it, which takes a second of processor time. So this module is imported only while
code is being traced.
"""

from __future__ import annotations

import torch

from multicard.errors import UnsupportedError

WHY = "a sequence that is split over ranks can't be compiled: its cache and its slices change with each call"


@torch.compiler.disable(reason=WHY)
def refuse(name: str) -> None:
    """Raise, when the traced code runs: what a traced function itself raises, Dynamo catches."""
    raise UnsupportedError(f"torch.compile of {name}: {WHY}. Leave it uncompiled, or split it by tp alone")
