"""What the benchmarks share: alternating contestants, the bound without exchanges, naming the machine, printing."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch

import multicard as mc
from multicard import collectives


def machine() -> dict[str, Any]:
    """Where and with what these figures were taken."""
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def alternate(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    calls: int = 1,
    statistic: Callable[[list[float]], float] = statistics.median,
) -> dict[str, float]:
    """Median seconds a call, or another statistic of them.

    Every round runs each contestant ``calls`` times: a noisy minute hits all alike. A contestant that returns a float
    has measured its own seconds, of one call.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for call in contestants.values():
        call()
    for _ in range(rounds):
        for name, call in contestants.items():
            start = time.perf_counter()
            for _ in range(calls):
                own = call()
            wall = (time.perf_counter() - start) / calls
            times[name].append(own if isinstance(own, float) else wall)
    return {name: statistic(each) for name, each in times.items()}


class NoShift:
    """A ring in which every rank keeps its own block."""

    def __init__(self, axis: mc.Axis) -> None:
        self.tensors: list[torch.Tensor] = []

    def start(self, tensors: list[torch.Tensor], shapes: Any = None) -> None:
        self.tensors = list(tensors)

    def wait(self) -> list[torch.Tensor]:
        return self.tensors


class NoExchange:
    """Messages that aren't sent: what would be received is zeros."""

    def __init__(self, sends: Any, receives: Mapping[int, torch.Tensor], axis: mc.Axis) -> None:
        for x in receives.values():
            x.zero_()

    def wait(self) -> None:
        pass


def own_repeated(x: torch.Tensor, axis: mc.Axis, dim: int = 0, sizes: Sequence[int] | None = None) -> torch.Tensor:
    """What an all-gather returns, made of this rank's part alone."""
    parts = [x.narrow(dim, 0, min(size, x.shape[dim])) for size in sizes or [x.shape[dim]] * axis.size]
    short = sum(sizes) - sum(part.shape[dim] for part in parts) if sizes else 0
    return torch.cat([*parts, x.narrow(dim, 0, short)], dim)


def same(x: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
    return x


@contextlib.contextmanager
def without_exchanges() -> Iterator[None]:
    """The bound: the same work on every rank, with every exchange taken out but what ranks agree on, whole numbers."""
    agree = collectives.all_reduce

    def only_agree(x: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        return x if x.is_floating_point() else agree(x, *rest, **options)

    with mock.patch.multiple(
        collectives,
        all_to_all=same,
        all_reduce=only_agree,
        all_gather=own_repeated,
        RingShift=NoShift,
        exchange=NoExchange,
    ):
        yield


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows under the first row's keys."""
    if not rows:
        return
    cells = [[*rows[0]], *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report(rows: Sequence[Mapping[str, Any]], as_json: bool, **about: Any) -> None:
    """Print the result: a table, or one JSON object and nothing else."""
    if as_json:
        print(json.dumps({**machine(), **about, "rows": list(rows)}))
        return
    print(*(f"{key}: {value}" for key, value in {**machine(), **about}.items()), sep=", ")
    print_table(rows)
