"""A collective call as numbers that ranks can compare, and as text for errors."""

from __future__ import annotations

import functools
import os
import sys
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from multicard.backends.reductions import COMBINE

ROOTED = ("broadcast", "reduce", "gather", "scatter")  # often called from different lines by root and others
SYMMETRIC = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
SAME_SHAPE = ("all_reduce", *ROOTED)  # the others' shapes may differ between ranks
CALLS = ("none", "barrier", *SYMMETRIC, *ROOTED)
CODES = {name: code for code, name in enumerate(CALLS)}
DTYPES = sorted({t for t in vars(torch).values() if isinstance(t, torch.dtype)}, key=str)
DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
OPS = tuple(COMBINE)
OP_CODES = {name: code for code, name in enumerate(OPS)}

Call = tuple[int, int, int, int]
"""A collective as numbers, the same on all its ranks: operation, dtype, elements, root or sizes with reduction."""
CALL_WORDS = 4

NOT_THE_CALLER = ("<eval_with_key>", "typing_extensions.py")  # generated code, deprecated names
_BACKENDS = os.path.dirname(__file__)
_OURS = os.path.dirname(_BACKENDS)
_TORCH = os.path.dirname(torch.__file__)
_REPLICA = os.path.join(_OURS, "replica.py")
"""Ranks compare there; one that has raised, or has no rows of a call, does from another line of the program."""


def to_call(name: str, x: Tensor | None, numel: int, detail: int, op: str) -> Call:
    """``numel`` and ``detail`` (root, or the value of :func:`size_code`) must be the same on all ranks."""
    return CODES[name], 0 if x is None else DTYPE_CODES[x.dtype], numel, detail * len(OPS) + OP_CODES[op]


def size_code(sizes: Sequence[int]) -> int:
    """A number for the sizes of parts by rank: the size itself if all are equal."""
    return sizes[0] if min(sizes) == max(sizes) else hash(tuple(sizes)) & 0xFFFFFFFF


def describe(call: Sequence[int]) -> str:
    """A call as text: ``all_reduce(4096 × torch.bfloat16, sum)``."""
    code, dtype, numel, detail = call
    name = CALLS[code]
    if name in ("none", "barrier"):
        return name
    if name == "all_to_all":
        return f"{name}({DTYPES[dtype]})"
    root, op = divmod(detail, len(OPS))
    reduction = f", {OPS[op]}" if name in ("all_reduce", "reduce_scatter", "reduce") else ""
    return f"{name}({numel} × {DTYPES[dtype]}{reduction}{f', root {root}' if name in ROOTED else ''})"


def sites() -> tuple[int, str]:
    """Where a collective was called: a number for the line in multicard and the line in the program, and the latter."""
    ours = ""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        whose = _whose(frame.f_code.co_filename)
        if whose == "program":
            break
        if whose == "multicard" and not ours:
            ours = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    return zlib.crc32(f"{ours} {line}".encode()), line


@functools.lru_cache(4096)
def _whose(file: str) -> str:
    """Whose code a file is: "multicard", "program", or "" for torch, what it generates, and collectives themselves."""
    if file == _REPLICA:
        return "program"
    if file.startswith(_OURS):
        return "" if file.startswith(_BACKENDS) or file.endswith("collectives.py") else "multicard"
    generated = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or "torchinductor_"  # the default's name begins so
    return "" if file.startswith(_TORCH) or any(part in file for part in (*NOT_THE_CALLER, generated)) else "program"
