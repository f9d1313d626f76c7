"""What each rank has of a pipeline's components."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from multicard.integrations.diffusers.denoisers import uncompiled
from multicard.integrations.diffusers.parts import BESIDE, PARTS, kinds
from multicard.integrations.diffusers.rows import split_by_rows
from multicard.integrations.diffusers.sequence import split_of
from multicard.integrations.diffusers.tensor import is_split
from multicard.mesh import ParallelMesh

REPORT = "_multicard_report"


@dataclasses.dataclass(frozen=True)
class ComponentReport:
    """What one rank has of a pipeline's component.

    Attributes:
        part: one of ``PARTS``, or "" for components that are in none.
        held: bytes of its parameters and buffers on this rank.
        how: what is divided over how many ranks, in words; "": nothing.
        whole: why all of its weights are on this rank; None: they are split.
        read: bytes that were read for it; None: not by multicard.
    """

    part: str
    held: int
    how: str
    whole: str | None
    read: int | None = None


def report(pipe: Any) -> dict[str, ComponentReport]:
    """What this rank has of a pipeline that was split, by component; empty for any other."""
    return dict(vars(pipe).get(REPORT, {}))


def note_report(pipe: Any, mesh: ParallelMesh, wanted: Collection[str], refused: Mapping[str, str]) -> None:
    """Note what this rank has of ``pipe``, for :func:`report`.

    Args:
        wanted: the parts that were to be split.
        refused: why components of these are whole, by name.
    """
    found = {}
    for name, kind in kinds(pipe).items():
        module = pipe.components[name]
        how = _how(kind, uncompiled(module), mesh) if kind in wanted else {}
        if kind in PARTS and kind not in wanted:
            why = f"parts= is without {kind!r}"
        elif kind == "denoiser":
            why = f"tp={mesh.tp.size} leaves its weights whole"
        elif how:
            why = "its weights are whole"
        else:
            why = "one rank" if mesh.replica.size == 1 else refused.get(name, "multicard splits no such component")
        words = ", ".join(f"{what} over {ranks}" for what, ranks in how.items())
        found[name] = ComponentReport(kind, held(module), words, None if "weights" in how else why)
    vars(pipe)[REPORT] = found


def _how(kind: str, module: nn.Module, mesh: ParallelMesh) -> dict[str, int]:
    """What of a component is divided, and over how many ranks."""
    if kind == "vae":
        return {"rows": mesh.replica.size} if split_by_rows(module) is not None else {}
    if kind == "text":
        return {"weights": mesh.replica.size} if BESIDE[kind].is_split(module) else {}
    found = {"guidance": mesh.cfg.size} if kind == "denoiser" and mesh.cfg.size > 1 else {}
    if split_by_rows(module) is not None or split_of(module) is not None:
        found["rows" if split_by_rows(module) is not None else "tokens"] = mesh.sequence.size
    return {**found, **({"weights": mesh.tp.size} if is_split(module) else {})}


def note_reads(pipe: Any, reads: Mapping[str, int]) -> None:
    """Note how many bytes were read for components, by name."""
    found = report(pipe)
    vars(pipe)[REPORT] = {name: dataclasses.replace(each, read=reads.get(name)) for name, each in found.items()}


def held(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, shared ones counted once."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())
