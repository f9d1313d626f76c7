"""The ranks that work on one request compare their inputs, exactly, before using them.

They compare at *points*: a request's arrival, a model's forward, a scheduler's step. Each rank hashes all its inputs,
each on its own device, and one all-reduce of three numbers a rank on each axis tells every rank whether all inputs are
the same. Descriptions are exchanged only if they differ.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from multicard import collectives
from multicard.axis import Axis
from multicard.digest import describe
from multicard.errors import MismatchError, RankError
from multicard.mesh import ParallelMesh

PAGE = 4096
"""Bytes for each rank's description of its inputs, exchanged only if ranks differ."""


class Status(enum.IntEnum):
    """A rank's state at a point."""

    OK = 0
    RAISED = 1
    CHANGED = 2
    """A call's output has another shape than the last time."""
    DIFFERS = 3
    """The ranks of an axis that was compared earlier differ; those of this axis must learn of it."""


class Replica:
    """The ranks of cfg × ring × ulysses × tp, which compare their inputs.

    Args:
        mesh: this rank's mesh.
        whole_mesh: also compare over dp, for inputs that all replicas must share.
    """

    def __init__(self, mesh: ParallelMesh, *, whole_mesh: bool = False) -> None:
        axes = (mesh.tp, mesh.sequence, mesh.cfg, *([mesh.dp] if whole_mesh else []))
        self.axes = tuple(axis for axis in axes if axis.size > 1)
        self.device = mesh.device
        self.compares = mesh.compares_inputs and not any(_is_fake(axis) for axis in self.axes)

    def compare(self, point: str, inputs: Mapping[str, Any]) -> None:
        """Raise on every rank unless all are at ``point`` with equal ``inputs``. One small all-reduce an axis.

        Args:
            point: a description of this point, for the error.
            inputs: by name: numbers, strings, tensors, arrays, pictures, generators, and containers of them. Objects
                of any other class are compared by class, functions by name.

        Raises:
            MismatchError: names the inputs that differ, and their values on two ranks.
            RankError: another rank raised before it reached this point.
        """
        if not self.compares or not self.axes or torch.compiler.is_compiling():
            return
        with torch.no_grad():
            found = describe(inputs)
            here, there = found.hash_here(point), found.hash_there()
            status = Status.OK
            for axis in self.axes:
                everybody = say(axis, self.device, status, here, there)
                if any(words != everybody[0] for words in everybody):
                    status = Status.DIFFERS
            if status is Status.DIFFERS:
                raise self._disagreement(point, inputs)

    def same_noise(self) -> None:
        """Copy the first rank's default random generator states to all. One broadcast of 5 KB an axis and device."""
        for device in {torch.device("cpu"), self.device}:
            module = torch if device.type == "cpu" else torch.get_device_module(device)
            state = module.get_rng_state()
            shared = state.to(self.device)
            for axis in self.axes:
                shared = collectives.broadcast(shared, axis)
            module.set_rng_state(shared.to(state.device))

    def same_numbers(self, tree: Any) -> Any:
        """``tree`` with the first rank's floating-point tensors. One broadcast each, on each axis."""

        def share(t: Tensor) -> Tensor:
            if t.is_floating_point():
                t = t.clone(memory_format=torch.contiguous_format)
                for axis in self.axes:
                    t = collectives.broadcast(t, axis)
            return t

        return tree_map_only(Tensor, share, tree)

    def _disagreement(self, point: str, inputs: Mapping[str, Any]) -> MismatchError:
        """The error, with descriptions of every rank's inputs. One all-gather of ``PAGE`` bytes a rank an axis."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        told = {name: _tell(value) for name, value in inputs.items()}
        pages = _page(rank, point, told).to(self.device)[None]
        for axis in self.axes:
            pages = collectives.all_gather(pages, axis)
        return _explain([json.loads(bytes(page.tolist()).rstrip(b"\0")) for page in pages.cpu()])


def say(
    axis: Axis, device: torch.device, status: Status, number: int, on_device: Tensor | None = None
) -> list[list[int]]:
    """Every rank's status and two numbers, by rank. One all-reduce of 24 bytes a rank, with zeros for other ranks.

    It has the same size at every point, so a rank that has raised can report it whichever point the others are at.

    Raises:
        RankError: another rank reports that it has raised, and this one doesn't.
    """
    words = torch.tensor([[0, 0, 0]] * axis.rank + [[status, number, 0]] + [[0, 0, 0]] * (axis.size - axis.rank - 1))
    words = words.to(device)
    if on_device is not None:
        words[axis.rank, 2] = on_device
    everybody: list[list[int]] = collectives.all_reduce(words, axis).tolist()
    if status != Status.RAISED:
        for rank, (said, *_) in enumerate(everybody):
            if said == Status.RAISED:
                raise RankError(f"rank {rank} of the {axis.name} axis raised", rank=rank, collective="comparison")
    return everybody


def _is_fake(axis: Axis) -> bool:
    return axis.group is None or dist.get_backend(axis.group) == "fake"


def _tell(value: Any) -> list[Any]:
    """A value's hash and its summary."""
    found = describe(value)
    there = found.hash_there()
    return [f"{found.hash_here()} {0 if there is None else int(there)}", found.summary()]


def _page(rank: int, point: str, told: Mapping[str, Sequence[Any]]) -> Tensor:
    """A rank's inputs as JSON of ``PAGE`` bytes; if they don't fit, without summaries, and then without hashes."""
    for inputs in (told, {name: [digest, ""] for name, (digest, _) in told.items()}, {}):
        text = json.dumps({"rank": rank, "point": point[:500], "inputs": inputs}).encode()
        if len(text) <= PAGE:
            break
    return torch.frombuffer(bytearray(text.ljust(PAGE, b"\0")), dtype=torch.uint8)


def _explain(pages: Sequence[Mapping[str, Any]]) -> MismatchError:
    first = pages[0]
    odd = next((page for page in pages if (page["point"], page["inputs"]) != (first["point"], first["inputs"])), first)
    if odd["point"] != first["point"]:
        return MismatchError(
            f"ranks {first['rank']} and {odd['rank']} are at different points: {first['point']} and {odd['point']}; "
            "every rank must make the same calls with the same arguments",
            rank=odd["rank"],
        )
    names = [
        name for name in {**first["inputs"], **odd["inputs"]} if first["inputs"].get(name) != odd["inputs"].get(name)
    ]
    nothing = ["", "nothing"]
    differences = "; ".join(
        f"{name} is {first['inputs'].get(name, nothing)[1] or 'one'} on rank {first['rank']} and "
        f"{odd['inputs'].get(name, nothing)[1] or 'another'} on rank {odd['rank']}"
        for name in names[:4]
    )
    return MismatchError(
        f"{first['point']}: ranks were given different inputs: {differences or 'too many to list'}. Give every rank "
        "the same arguments, and generators with the same seed",
        rank=odd["rank"],
    )
