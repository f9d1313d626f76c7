"""Who is to blame for a wait that took too long: the rank that did not arrive, and where it is instead."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from multicard.errors import CollectiveTimeout
from multicard.ranks import failure
from multicard.ranks.activity import Call
from multicard.ranks.failure import Failure
from multicard.ranks.settings import Settings

Activities = Mapping[int, Mapping[str, Any]]


def explain(failures: Sequence[Failure], activities: Activities, stopped: Collection[int], wanted: Settings) -> Failure:
    """The timeout that ranks reported, with the rank that kept them waiting.

    Args:
        failures: what ranks reported; at least one timeout.
        activities: what each rank that still answers is doing (``activity.report``).
        stopped: ranks that were found stopped.
    """
    waited = min((f for f in failures if f.kind == failure.TIMEOUT), key=lambda f: f.moment)
    call, told = waited.call, waited.error
    name, number = (call.collective, call.number) if call else ("a collective", None)
    if isinstance(told, CollectiveTimeout) and told.rank is not None:  # shm knows whom it waited for
        absent = [told.rank]
        name, number = told.collective or name, told.sequence_number or number
    else:
        absent = _absent(waited, failures, activities, wanted.config.world_size)
    which = f"{name} number {number}" if number is not None else name
    axis = f" of {call.axis}" if call and call.axis else ""
    site = f" (called at {call.site})" if call and call.site else ""
    who = _names(absent) if absent else "no rank that could be told apart"
    where = f": {_place(absent[0], activities, stopped)}" if absent else ""
    error = CollectiveTimeout(
        f"{who} did not arrive at {which}{axis} within {wanted.timeout:g} s{site}{where}",
        rank=absent[0] if absent else None,
        collective=name,
        sequence_number=number,
    )
    return _with_stacks(Failure(error.rank or 0, failure.TIMEOUT, waited.moment, error, call), activities, [waited])


def late(missing: Sequence[int], activities: Activities, stopped: Collection[int], wanted: Settings) -> Failure:
    """Ranks that did not start in time."""
    where = _place(missing[0], activities, stopped)
    message = f"{_names(missing)} did not start within {wanted.start_timeout:g} s: {where}"
    error = CollectiveTimeout(message, rank=missing[0], collective="start")
    return _with_stacks(Failure(missing[0], failure.TIMEOUT, time.monotonic(), error), activities, [])


def stopped(rank: int, wanted: Settings) -> Failure:
    """A rank that is stopped while the caller waits for nobody else."""
    error = CollectiveTimeout(f"rank {rank} has been stopped (SIGSTOP) for {wanted.timeout:g} s", rank=rank)
    return Failure(rank, failure.OWN, time.monotonic(), error)


def waited(rank: int, call: Call) -> Failure:
    """A rank that was seen in one collective for too long, from outside."""
    error = CollectiveTimeout(f"rank {rank} waited too long in {call}", collective=call.collective)
    return Failure(rank, failure.TIMEOUT, time.monotonic(), error, call)


def left(rank: int, label: str, waits: Call, activities: Activities) -> Failure:
    """A rank that has left what was called, while others are in a collective that it never entered."""
    error = CollectiveTimeout(
        f"rank {rank} did not arrive at {waits}: it has left {label}",
        rank=rank,
        collective=waits.collective,
        sequence_number=waits.number,
    )
    return _with_stacks(Failure(rank, failure.OWN, time.monotonic(), error, waits), activities, [])


def _absent(waited: Failure, failures: Sequence[Failure], activities: Activities, size: int) -> list[int]:
    """Members of the group that have entered fewer of its collectives than the rank that waited, or don't answer."""
    call = waited.call
    waiting = {f.rank for f in failures if f.kind == failure.TIMEOUT}
    members = call.ranks if call and call.ranks else range(size)
    others = [rank for rank in members if rank not in waiting]
    if call is None or call.number is None:
        return [rank for rank in others if rank not in activities or activities[rank]["call"] is None] or others
    entered = {rank: activities[rank]["numbers"].get(call.key, 0) for rank in others if rank in activities}
    return [rank for rank in others if entered.get(rank, 0) < call.number] or others


def _place(rank: int, activities: Activities, stopped: Collection[int]) -> str:
    if rank in stopped:
        return "it is stopped (SIGSTOP)"
    if rank not in activities:
        return "it doesn't answer"
    call = activities[rank]["call"]
    return f"it is in {call}" if call is not None else f"it is at {activities[rank]['place']}"


def _names(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _with_stacks(found: Failure, activities: Activities, raised: Sequence[Failure]) -> Failure:
    for note in [note for each in raised for note in getattr(each.error, "__notes__", [])]:
        found.error.add_note(note)
    raised_by = {each.rank for each in raised}
    for rank in sorted(set(activities) - raised_by):
        found.error.add_note(f"rank {rank}'s Python stacks:\n{activities[rank]['stacks'].rstrip()}")
    return found
