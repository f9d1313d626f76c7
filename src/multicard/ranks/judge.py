"""Whether a call has failed, which rank caused it, and whether the ranks stay usable: decided from a snapshot alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from multicard.errors import CheckpointError, CollectiveTimeout, ConfigError, UnsupportedError
from multicard.ranks.activity import Collective, Report
from multicard.ranks.failure import OWN, TIMEOUT, Failure, first_real
from multicard.ranks.patience import Patience
from multicard.ranks.snapshot import Seen, Snapshot

REFUSALS = (ConfigError, UnsupportedError, CheckpointError)


@dataclasses.dataclass(frozen=True)
class Wait:
    """Nothing to raise yet: judge again after the next event, at the moment ``until`` at the latest.

    Attributes:
        ask: first ask all ranks what they are doing.
        wake: before that, continue stopped ranks, so that they can report too: all are about to be ended.
    """

    until: float
    ask: bool = False
    wake: bool = False


def judge(snapshot: Snapshot, patience: Patience) -> Failure | Wait:
    """The failure to raise for a call that not all ranks have finished without an error, or what to wait for.

    ``Failure.fatal`` says whether the ranks must be ended.
    """
    snapshot = _count_hung(snapshot, patience)
    if snapshot.failures():
        return _failed(snapshot, patience)
    if snapshot.now >= snapshot.deadline:
        return _ask_since(snapshot.deadline, snapshot, patience, wake=True) or _late(snapshot, patience)
    return _stopped(snapshot, patience) or _left(snapshot, patience) or _look(snapshot, patience)


def _count_hung(snapshot: Snapshot, patience: Patience) -> Snapshot:
    """The snapshot, with a timeout as the failure of any rank that has been in one collective for too long.

    Backends' own limits come first if they work; groups that scripts make have torch's, half an hour.
    """
    limit = patience.timeout + patience.report
    ranks: dict[int, Seen] = dict(snapshot.ranks)
    for rank, seen in snapshot.waiting.items():
        if seen.report is not None and seen.report.collective and seen.report.moment > seen.unchanged + limit:
            collective, moment = seen.report.collective, seen.unchanged + limit
            error = CollectiveTimeout(f"rank {rank} waited too long in {collective}", collective=collective.name)
            failure = Failure(rank, TIMEOUT, moment, error, collective)
            ranks[rank] = dataclasses.replace(seen, answered=moment, failure=failure)
    return dataclasses.replace(snapshot, ranks=ranks)


def _failed(snapshot: Snapshot, patience: Patience) -> Failure | Wait:
    """A rank has failed. The others get time to finish the call too, unless one has died or waits in vain.

    Only events within that time count, so it makes no difference how long reports take afterwards. The ranks stay
    usable if all have finished the call and have entered the same collectives in it: then no message of this call is
    under way that a later call could receive.
    """
    failed = [(s.answered, s.failure.error) for s in snapshot.ranks.values() if s.failure and s.answered is not None]
    began, error = min(failed, key=lambda each: each[0])
    over = min(snapshot.finished, began + (patience.refused if isinstance(error, REFUSALS) else patience.others))
    first, dead = first_real(snapshot.failures()), any(seen.dead for seen in snapshot.ranks.values())
    if snapshot.now < over:
        if first.kind != OWN or not (dead or _absentee(snapshot)):
            return _ask_every(max(patience.first_look, snapshot.asked - began), snapshot, over)
        over = snapshot.now
    failures = snapshot.failures(over)
    first = first_real(failures)
    if first.kind == TIMEOUT and not dead:
        return _ask_since(over, snapshot, patience, wake=True) or _explained(failures, over, snapshot, patience)
    if first.fatal or dead or snapshot.finished > over:
        return dataclasses.replace(first, fatal=True)
    return _ask_since(over, snapshot, patience) or dataclasses.replace(first, fatal=not _in_step(over, snapshot))


def _stopped(snapshot: Snapshot, patience: Patience) -> Failure | None:
    """A stopped rank counts as hanging, even if no other rank waits for it in a collective."""
    waits = [seen.report.collective for seen in snapshot.waiting.values() if seen.report and seen.report.collective]
    for rank, seen in snapshot.waiting.items():
        long = seen.stopped is not None and snapshot.now > seen.stopped + patience.timeout + patience.report
        if long and not any(rank in collective.ranks for collective in waits):
            text = f"rank {rank} has been stopped (SIGSTOP) for {patience.timeout:g} s"
            return Failure(rank, OWN, snapshot.now, CollectiveTimeout(text, rank=rank))
    return None


def _left(snapshot: Snapshot, patience: Patience) -> Failure | Wait | None:
    """A rank that has left the call will never arrive at a collective in which another waits for it."""
    absentee = _absentee(snapshot, exact=True)
    if absentee is None or (wait := _ask_since(snapshot.asked, snapshot, patience)):
        return wait if absentee else None
    rank, waits = absentee
    text = f"rank {rank} did not arrive at {waits}: it has left {snapshot.label}"
    error = CollectiveTimeout(text, rank=rank, collective=waits.name, sequence_number=waits.number)
    return _with_stacks(Failure(rank, OWN, snapshot.now, error, waits), snapshot.reports(snapshot.asked))


def _late(snapshot: Snapshot, patience: Patience) -> Failure:
    """Ranks that did not start in time."""
    missing, reports = list(snapshot.waiting), snapshot.reports(snapshot.deadline)
    where = _place(missing[0], reports, snapshot)
    text = f"{_names(missing)} did not start within {patience.start_timeout:g} s: {where}"
    error = CollectiveTimeout(text, rank=missing[0], collective="start")
    return _with_stacks(Failure(missing[0], TIMEOUT, snapshot.now, error), reports)


# ---- when to ask ranks what they are doing


def _look(snapshot: Snapshot, patience: Patience) -> Wait:
    """Nothing is wrong so far: check more often once some ranks have returned, since others may wait for them."""
    often = len(snapshot.waiting) < len(snapshot.ranks)
    pause = patience.look if often else max(patience.look, patience.timeout / patience.looks)
    return _ask_every(pause, snapshot, snapshot.deadline)


def _ask_every(pause: float, snapshot: Snapshot, end: float) -> Wait:
    due = snapshot.asked + pause
    return Wait(min(due, end)) if snapshot.now < due else Wait(min(snapshot.now + pause, end), ask=True)


def _ask_since(since: float, snapshot: Snapshot, patience: Patience, wake: bool = False) -> Wait | None:
    """Ask what ranks are doing after ``since``; None once all have answered, or have had the time to."""
    if snapshot.asked < since:
        return Wait(snapshot.now + patience.report, ask=True, wake=wake)
    until = snapshot.asked + patience.report
    all_heard = len(snapshot.reports(since)) == len(snapshot.ranks)
    return None if all_heard or snapshot.now >= until else Wait(until)


# ---- who waits for whom


def _absentee(snapshot: Snapshot, exact: bool = False) -> tuple[int, Collective] | None:
    """A rank that has left the call, and a collective that it never entered although another rank waits in it.

    ``exact`` leaves out collectives of groups that count messages too.
    """
    left = [
        (rank, seen.answered, seen.report.entered)
        for rank, seen in snapshot.ranks.items()
        if seen.answered is not None and seen.report is not None and seen.report.moment > seen.answered
    ]
    for report in [seen.report for seen in snapshot.waiting.values() if seen.report is not None]:
        waits = report.collective
        if waits is not None and waits.number is not None and (waits.exact or not exact):
            for (
                rank,
                moment,
                entered,
            ) in left:  # one that is no member, or has destroyed the group, counts nothing there
                if report.moment > moment and entered.get(waits.key, waits.number) < waits.number:
                    return rank, waits
    return None


def _in_step(since: float, snapshot: Snapshot) -> bool:
    """Whether all ranks report, and agree on how many collectives each group has entered."""
    reports = snapshot.reports(since)
    counts = {count for report in reports.values() for count in report.entered.items()}
    return len(reports) == len(snapshot.ranks) and len(counts) == len(dict(counts))


def _explained(failures: Sequence[Failure], since: float, snapshot: Snapshot, patience: Patience) -> Failure:
    """The earliest timeout, with the rank that did not arrive and what it was doing instead."""
    reports = snapshot.reports(since)
    waited = min((each for each in failures if each.kind == TIMEOUT), key=lambda each: each.moment)
    call, error = waited.collective or Collective("a collective"), waited.error
    if isinstance(error, CollectiveTimeout) and error.rank is not None:  # shm knows whom it waited for
        absent = [error.rank]
        name, number = error.collective or call.name, error.sequence_number or call.number
        call = dataclasses.replace(call, name=name, number=number)
    else:
        absent = _absent(call, failures, reports, snapshot)
    who = _names(absent) if absent else "a rank"
    where = _place(absent[0], reports, snapshot) if absent else "could not determine which"
    text = f"{who} did not arrive at {call} within {patience.timeout:g} s: {where}"
    rank = absent[0] if absent else None
    made = CollectiveTimeout(text, rank=rank, collective=call.name, sequence_number=call.number)
    for note in getattr(error, "__notes__", []):
        made.add_note(note)
        reports.pop(waited.rank, None)  # the note is its traceback
    return _with_stacks(Failure(rank or 0, TIMEOUT, waited.moment, made, call), reports)


def _absent(
    call: Collective, failures: Sequence[Failure], reports: Mapping[int, Report], snapshot: Snapshot
) -> list[int]:
    """Members of the group that have entered fewer of its collectives than a rank that waited, or don't answer."""
    waiting = {each.rank for each in failures if each.kind == TIMEOUT}
    others = [rank for rank in call.ranks or snapshot.ranks if rank not in waiting]
    if call.number is None:
        return [rank for rank in others if rank not in reports or reports[rank].collective is None] or others
    entered = {rank: reports[rank].entered.get(call.key, 0) for rank in others if rank in reports}
    return [rank for rank in others if entered.get(rank, 0) < call.number] or others


# ---- in words


def _place(rank: int, reports: Mapping[int, Report], snapshot: Snapshot) -> str:
    seen = snapshot.ranks.get(rank)
    if seen is not None and seen.stopped is not None:
        return "it is stopped (SIGSTOP)"
    if rank not in reports:
        return "it doesn't answer"
    collective = reports[rank].collective
    return f"it is in {collective}" if collective is not None else f"it is at {reports[rank].place}"


def _names(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _with_stacks(found: Failure, reports: Mapping[int, Report]) -> Failure:
    for rank, report in sorted(reports.items()):
        found.error.add_note(f"rank {rank}'s Python stacks:\n{report.stacks.rstrip()}")
    return found
