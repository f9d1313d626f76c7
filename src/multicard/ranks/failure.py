"""Failures: how a rank describes one to its parent, and how the parent distinguishes cause and consequences."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import pickle
import re
import signal
import time
import traceback
from collections.abc import Iterable
from typing import Any

from multicard.errors import CollectiveTimeout, RankError
from multicard.ranks import activity, wire

LOOP = ("ranks/rank.py", "ranks/kept.py", "ranks/forkserver.py", "<frozen runpy>")
"""Files of the frames below every call in a rank."""

OWN, TIMEOUT, CONSEQUENCE = "own", "timeout", "consequence"

_TIMED_OUT = re.compile(r"timed out waiting|timeout|Timed out", re.IGNORECASE)
_PEER_GONE = re.compile(
    r"connection closed by peer|connection reset by peer|broken pipe|connection was likely closed"
    r"|remote process exited|no error message.*connection|socket closed|application timeout caused pair closure"
    r"|gloo.*(pair|connect)",
    re.IGNORECASE,
)
_BACKEND = re.compile(r"\.(cc|cpp|hpp|h):\d+|\b(gloo|nccl|hccl|c10d|TCPStore)\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why one rank did not finish a call.

    Attributes:
        rank: the rank's number.
        kind: OWN (it raised or died), TIMEOUT (it waited for another rank), CONSEQUENCE (of another rank's end).
        moment: when, by ``time.monotonic()``, which all processes of a host share.
        error: the error to raise.
        collective: the collective that it was in.
        fatal: the ranks can't serve further calls and must be ended.
    """

    rank: int
    kind: str
    moment: float
    error: BaseException
    collective: activity.Collective | None = None
    fatal: bool = True


def describe(error: BaseException, rank: int) -> tuple[Failure, bytes | None]:
    """In the rank: the failure in words, and what unpickles to ``error`` itself if anything does."""
    said = RankError(f"rank {rank} raised {type(error).__name__}: {_text(error)}", rank=rank)
    text = "".join(traceback.format_exception(_without_ours(error)))
    said.add_note(f"raised on rank {rank}:\n{text.rstrip()}")
    fatal = any(isinstance(link, RankError) for link in _chain(error))
    failure = Failure(rank, _kind(error, rank), time.monotonic(), said, activity.collective_of(error), fatal)
    error.__traceback__ = None
    return failure, _pickled(error)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as other:  # its __str__ may raise anything
        return f"(its __str__ raised {type(other).__name__})"


def _pickled(error: BaseException) -> bytes | None:
    """What unpickles to ``error``; None where it holds what can't be pickled, or its own methods object."""
    for value in (error, _Parts(error)):
        with contextlib.suppress(Exception):
            pickled = wire.dumps(value)
            if type(pickle.loads(pickled)) is type(error):
                return pickled
    return None


class _Parts:
    """Pickled in an error's place where its ``__init__`` takes other arguments than ``args``: it isn't called then."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce__(self) -> Any:
        made = type(self._error)
        return made.__new__, (made, *self._error.args), vars(self._error)


def _without_ours(error: BaseException) -> BaseException:
    """The error without the frames of the rank's own loop, which are the same for every call."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename.endswith(LOOP):
        trace = trace.tb_next
    return error.with_traceback(trace)


def _chain(error: BaseException) -> list[BaseException]:
    """The error, its cause, the cause of that, and so on."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return chain


def _kind(error: BaseException, rank: int) -> str:
    for link in _chain(error):
        if isinstance(link, CollectiveTimeout):
            return TIMEOUT
        if isinstance(link, RankError) and link.rank not in (None, rank):
            return CONSEQUENCE
        if isinstance(link, RuntimeError) and _BACKEND.search(str(link)):
            if _TIMED_OUT.search(str(link)):
                return TIMEOUT
            if _PEER_GONE.search(str(link)):
                return CONSEQUENCE
    return OWN


def revive(message: wire.Message) -> Failure:
    """In the parent: the failure that a message describes, with the rank's own exception where that can be had."""
    found, pickled = message.load()
    try:
        error = pickle.loads(pickled)
    except Exception:  # it couldn't be pickled, or its module isn't importable here
        return found
    if not isinstance(error, Exception):  # an exit isn't the caller's to make
        return found
    error.add_note(found.error.__notes__.pop())
    if not isinstance(error, RankError):
        error.__cause__ = found.error
    return dataclasses.replace(found, error=error)


def death(rank: int, returncode: int, tail: Iterable[str], out_of_memory: bool, doing: str, moment: float) -> Failure:
    """The failure of a rank that exited or was killed, the last lines of its standard error being ``tail``.

    ``out_of_memory`` is whether the kernel has killed processes for memory since the ranks were started, ``doing`` what
    the rank was doing, as the end of a sentence.
    """
    number = -returncode if returncode < 0 else None
    if number is None:
        what = f"rank {rank} exited with code {returncode} {doing}"
    else:
        names = {each.value: each.name for each in signal.Signals}  # real-time signals have none
        what = f"rank {rank} was killed by {names.get(number, 'a signal')} (signal {number}) {doing}"
    if number == signal.SIGKILL and out_of_memory:
        what += ": the kernel ran out of memory; use more ranks, a smaller dtype or a shorter context"
    stderr = "\n".join(tail)
    error = RankError(what, rank=rank, signal=number, stderr=stderr)
    if stderr:
        error.add_note(f"the end of rank {rank}'s standard error:\n{stderr}")
    return Failure(rank, OWN, moment, error)


def first_real(failures: Iterable[Failure]) -> Failure:
    """The failure to raise: the earliest of kind OWN, else the earliest TIMEOUT, else the earliest."""
    order = (OWN, TIMEOUT, CONSEQUENCE)
    return min(failures, key=lambda failure: (order.index(failure.kind), failure.moment))


def kills_for_memory() -> int:
    """How many processes the kernel has killed for lack of memory, on this machine or in this container."""
    found = 0
    for path in ("/proc/vmstat", "/sys/fs/cgroup/memory.events"):
        try:
            lines = pathlib.Path(path).read_text().splitlines()
        except OSError:
            continue
        found += sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return found
