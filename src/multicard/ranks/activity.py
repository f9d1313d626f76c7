"""What a rank is doing, reported from a separate thread: stacks, and the current collective."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_C10D = os.path.join("torch", "distributed", "distributed_c10d.py")
_AROUND_IT = ("c10d_logger.py", "_functional_collectives.py", "typing_extensions.py")  # the last wraps deprecated calls
_OURS = (os.path.join(_HERE, "collectives.py"), os.path.join(_HERE, "backends"))


@dataclasses.dataclass(frozen=True)
class Collective:
    """A rank's call of a collective.

    Attributes:
        name: as in ``torch.distributed``.
        group: its group's name, the same on all of the group's ranks.
        axis: the group's description, for errors.
        ranks: the group's ranks.
        number: its number in the group, from 1.
        exact: whether numbers count collectives only; gloo's count messages too, which differ between ranks.
        site: ``file:line`` of the code that called it.
    """

    name: str
    group: str = ""
    axis: str = ""
    ranks: tuple[int, ...] = ()
    number: int | None = None
    exact: bool = False
    site: str = ""

    @property
    def key(self) -> str:
        """The group's name and ranks: unique in the job."""
        return f"{self.group} {self.ranks}"

    def __str__(self) -> str:
        number = f" number {self.number}" if self.number is not None else ""
        axis = f" of {self.axis}" if self.axis else ""
        return f"{self.name}{number}{axis}" + (f" at {self.site}" if self.site else "")


@dataclasses.dataclass(frozen=True)
class Report:
    """What a rank is doing at one moment.

    Attributes:
        moment: by ``time.monotonic()``, which all processes of a host share.
        collective: the current one; None: it is in none.
        entered: how many collectives it has entered, by group (:attr:`Collective.key`).
        place: the innermost line of its main thread.
        stacks: the Python stacks of all its threads, as text.
    """

    moment: float
    collective: Collective | None
    entered: Mapping[str, int]
    place: str = ""
    stacks: str = ""


def is_communication(frame: FrameType) -> bool:
    """Whether the frame belongs to a collective itself rather than to code that calls one."""
    path = frame.f_code.co_filename
    return path.startswith(_OURS) or path.endswith((_C10D, *_AROUND_IT))


def collective_in(frames: Sequence[FrameType]) -> Collective | None:
    """The collective that ``frames``, innermost first, are in; None if the innermost isn't a collective's."""
    inside = list(itertools.takewhile(is_communication, frames))
    if not inside:
        return None
    named = [frame for frame in inside if frame.f_code.co_filename.endswith(_C10D)]
    named = [frame for frame in named if not frame.f_code.co_name.startswith("_")] or inside
    caller = frames[len(inside)] if len(inside) < len(frames) else None
    group, dist = named[-1].f_locals.get("group"), _distributed()
    if dist is not None and not isinstance(group, dist.ProcessGroup):
        group = dist.group.WORLD
    return dataclasses.replace(
        _last_in(group) if dist is not None else Collective(""),
        name=named[-1].f_code.co_name,
        site=f"{caller.f_code.co_filename}:{caller.f_lineno}" if caller is not None else "",
    )


def collective_of(error: BaseException) -> Collective | None:
    """The collective that raised ``error``."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return collective_in(frames[::-1])


def report() -> Report:
    """What this rank is doing now, for its parent. Called from a thread other than the main one."""
    moment, threads, dist = time.monotonic(), sys._current_frames(), _distributed()
    main = threads.get(threading.main_thread().ident or 0)
    frames = [] if main is None else [frame for frame, _ in traceback.walk_stack(main)]
    groups = [] if dist is None else [_last_in(group) for group in list(dist.distributed_c10d._world.pg_map)]
    return Report(
        moment,
        collective=collective_in(frames),
        entered={last.key: last.number or 0 for last in groups},
        place=f"{main.f_code.co_filename}:{main.f_lineno} ({main.f_code.co_name})" if main is not None else "its end",
        stacks="".join(
            f"thread {thread.name}:\n{''.join(traceback.format_stack(threads[thread.ident]))}"
            for thread in threading.enumerate()  # the main one first
            if thread.ident in threads and thread is not threading.current_thread()
        ),
    )


def _distributed() -> Any:
    """torch.distributed if it is imported and in use; a rank that hangs before that has to answer too."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and getattr(dist, "is_initialized", bool)() else None


def _last_in(group: Any) -> Collective:
    """The collective that was entered last in ``group``, as far as that knows."""
    ranks = sys.modules["torch.distributed"].distributed_c10d._world.pg_group_ranks.get(group, {})
    try:
        number = group._get_sequence_number_for_group() or None
    except RuntimeError:  # this backend doesn't count
        number = None
    return Collective(
        "",
        group=group.group_name,
        axis=group.group_desc.removeprefix("mesh_") if group.group_desc.startswith("mesh_") else "",
        ranks=tuple(sorted(ranks)),
        number=number,
        exact=getattr(group, "counts_collectives_alone", False),
    )
