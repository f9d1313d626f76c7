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
    group = _group_of(named[-1])
    return Collective(
        named[-1].f_code.co_name,
        **_about(group),
        number=_number(group),
        exact=getattr(group, "counts_collectives_alone", False),
        site=f"{caller.f_code.co_filename}:{caller.f_lineno}" if caller is not None else "",
    )


def _distributed() -> Any:
    """torch.distributed if it is imported and in use; a rank that hangs before that has to answer too."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and getattr(dist, "is_initialized", bool)() else None


def entered() -> dict[str, int]:
    """How many collectives this rank has entered, by group: see :attr:`Collective.exact`."""
    dist = _distributed()
    if dist is None:
        return {}
    groups = list(dist.distributed_c10d._world.pg_map)
    return {Collective("", **_about(group)).key: _number(group) or 0 for group in groups}


def stacks() -> str:
    """The Python stacks of this process's threads, the main one first."""
    frames = sys._current_frames()
    threads = sorted(threading.enumerate(), key=lambda thread: thread is not threading.main_thread())
    texts = []
    for thread in threads:
        if thread.ident in frames and thread is not threading.current_thread():
            texts.append(f"thread {thread.name}:\n" + "".join(traceback.format_stack(frames[thread.ident])))
    return "".join(texts)


def report() -> Report:
    """What this rank is doing now, for its parent. Called from a thread other than the main one."""
    moment = time.monotonic()
    main = sys._current_frames().get(threading.main_thread().ident or 0)
    frames = [] if main is None else [frame for frame, _ in traceback.walk_stack(main)]
    place = f"{main.f_code.co_filename}:{main.f_lineno} ({main.f_code.co_name})" if main is not None else "its end"
    return Report(moment, collective_in(frames), entered(), place, stacks())


def collective_of(error: BaseException) -> Collective | None:
    """The collective that raised ``error``."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return collective_in(frames[::-1])


def _group_of(frame: FrameType) -> Any:
    dist = _distributed()
    if dist is None:
        return None
    group = frame.f_locals.get("group")
    return group if isinstance(group, dist.ProcessGroup) else dist.group.WORLD


def _about(group: Any) -> dict[str, Any]:
    dist = _distributed()
    if group is None or dist is None:
        return {}
    ranks = dist.distributed_c10d._world.pg_group_ranks.get(group, {})
    axis = group.group_desc.removeprefix("mesh_") if group.group_desc.startswith("mesh_") else ""
    return {"group": group.group_name, "axis": axis, "ranks": tuple(sorted(ranks))}


def _number(group: Any) -> int | None:
    if group is None:
        return None
    try:
        return group._get_sequence_number_for_group() or None
    except RuntimeError:  # this backend doesn't count
        return None
