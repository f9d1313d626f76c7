"""What is raised for a call, and whether the ranks live on: judged from snapshots, without any process."""

import dataclasses
import math

import pytest

from multicard.errors import CollectiveTimeout, ConfigError, RankError
from multicard.ranks.activity import Collective, Report
from multicard.ranks.failure import CONSEQUENCE, OWN, TIMEOUT, Failure
from multicard.ranks.judge import Wait, judge
from multicard.ranks.patience import Patience
from multicard.ranks.snapshot import Seen, Snapshot

PATIENCE = Patience(timeout=10.0, start_timeout=30.0, looks=10)
BUSY = Seen()
REDUCE = Collective("all_reduce", group="tp", axis="tp", ranks=(0, 1, 2), number=5, exact=True, site="work.py:7")


def report(moment, collective=None, entered=4):
    return Report(moment, collective, {REDUCE.key: entered}, "work.py:9 (compute)", "stacks")


def done(moment, entered=4, reported=None):
    return Seen(moment, report=None if reported is None else report(reported, entered=entered))


def failed(moment, kind=OWN, error=None, fatal=False, collective=None, **seen):
    error = error or LookupError("not in the index")
    return Seen(moment, Failure(0, kind, moment, error, collective, fatal), **seen)


def dead(moment):
    return Seen(moment, Failure(2, OWN, moment, RankError("rank 2 was killed", rank=2)), dead=True)


def waits(reported, since=0.0, collective=REDUCE):
    return Seen(report=report(reported, collective, entered=5), unchanged=since)


def look(*ranks, now=1.0, asked=0.0, deadline=math.inf):
    numbered = {}
    for rank, seen in enumerate(ranks):
        own = seen.failure and dataclasses.replace(seen.failure, rank=rank)
        numbered[rank] = dataclasses.replace(seen, failure=own)
    snapshot = Snapshot(now, "work", numbered, asked, deadline)
    return judge(snapshot, PATIENCE)


# ---- nothing is wrong


@pytest.mark.parametrize(
    ("ranks", "now", "expected"),
    [
        ((BUSY, BUSY), 0.6, Wait(1.0)),  # a tenth of the timeout
        ((BUSY, BUSY), 1.2, Wait(2.2, ask=True)),
        ((BUSY, done(0.2)), 0.6, Wait(1.1, ask=True)),
        ((waits(9.0), done(8.0, 5, 9.0)), 9.2, Wait(9.7, ask=True)),  # it is on its way out of the collective
        ((waits(9.0), done(8.0, 4, 7.9)), 9.2, Wait(9.7, ask=True)),  # reported before it left: may have entered since
        ((waits(7.9), done(8.0, 4, 9.0)), 9.2, Wait(9.7, ask=True)),  # may have got out since
        ((waits(10.4), BUSY), 10.45, Wait(11.45, ask=True)),  # not yet for long enough
        ((waits(9.0), BUSY), 12.0, Wait(13.0, ask=True)),  # it may have got out since it was last heard of
        ((Seen(stopped=0.0), BUSY), 10.4, Wait(11.4, ask=True)),
    ],
)
def test_waiting_goes_on(ranks, now, expected):
    verdict = look(*ranks, now=now)
    assert verdict == expected


def test_gloos_numbers_count_messages_too_and_prove_nothing():
    collective = dataclasses.replace(REDUCE, exact=False)
    assert isinstance(look(waits(0.9, collective=collective), done(0.5, 3, 0.9)), Wait)


def test_a_deadline_ends_the_wait():
    assert look(BUSY, BUSY, now=0.1, deadline=0.3) == Wait(0.3)


# ---- a rank has failed


@pytest.mark.parametrize(
    ("ranks", "now", "fatal"),
    [
        ((failed(1.0), BUSY), 1.4, None),  # the other may fail alike
        ((failed(1.0), BUSY), 1.5, True),
        ((failed(1.0, CONSEQUENCE), BUSY), 1.4, None),  # the cause may still arrive
        ((failed(1.0), waits(1.1)), 1.2, None),  # may just be on its way
        ((failed(1.0, report=report(1.1)), waits(1.1)), 1.2, True),  # waits for the one that failed
        ((failed(1.0, CONSEQUENCE, report=report(1.1)), waits(1.1)), 1.2, None),
        ((failed(1.0), dead(1.1), BUSY), 1.2, True),
        ((failed(1.0, TIMEOUT), dead(1.6), BUSY), 1.7, True),  # nobody is left to say who was waited for
        ((failed(1.0, error=ConfigError("too long")), BUSY), 5.9, None),
        ((failed(1.0, error=ConfigError("too long")), BUSY), 6.0, True),
        ((failed(1.0), failed(1.1)), 1.2, None),  # are they in step?
        ((failed(1.0, report=report(1.2)), done(1.1, reported=1.2)), 1.3, False),
        ((failed(1.0, report=report(1.2)), done(1.1, reported=1.2, entered=5)), 1.3, True),
        ((failed(1.0, report=report(1.2)), done(1.1)), 1.3, None),
        ((failed(1.0, report=report(1.2)), done(1.1)), 1.7, True),  # it says nothing
        ((failed(1.0, fatal=True, report=report(1.2)), done(1.1, reported=1.2)), 1.3, True),
        ((failed(1.0, report=report(1.8)), done(1.6, reported=1.8)), 1.9, True),  # the other was too late
    ],
)
def test_ranks_live_on_if_all_finish_in_step(ranks, now, fatal):
    asked = max([1.05, *(seen.report.moment for seen in ranks if seen.report)])
    verdict = look(*ranks, now=now, asked=min(asked, 1.2))
    assert isinstance(verdict, Wait) if fatal is None else verdict.fatal == fatal
    assert fatal is None or isinstance(verdict.error, LookupError | ConfigError)


@pytest.mark.parametrize(("asked", "due"), [(0.5, None), (1.0, 1.02), (1.02, 1.04), (1.04, 1.08), (1.3, 1.5)])
def test_after_a_failure_ranks_are_asked_at_once_and_then_less_and_less(asked, due):
    verdict = look(failed(1.0), BUSY, now=max(1.0, asked), asked=asked)
    assert (verdict.ask, verdict.until) == ((True, 1.02) if due is None else (False, pytest.approx(due)))


def test_the_first_cause_is_raised():
    waited, reset = failed(1.0, TIMEOUT), failed(0.9, CONSEQUENCE)
    assert look(reset, waited, dead(1.2), now=1.3).error.rank == 2
    assert look(failed(1.1, error=KeyError("own")), reset, dead(1.2), now=1.3).error.args == ("own",)


def test_a_rank_that_dies_after_it_has_returned_is_the_cause():
    ended = Seen(1.4, Failure(0, OWN, 1.4, RankError("rank 0 was killed")), dead=True)
    assert look(dead(1.0), ended, now=1.5).error.rank == 2


# ---- hangs

NAMED = "did not arrive at all_reduce number 5"


def test_a_rank_that_has_left_is_named_with_all_stacks():
    ranks = done(1.0, reported=1.2), waits(1.2)
    assert look(*ranks, Seen(report=report(1.0)), now=1.3, asked=1.1) == Wait(1.6)
    found = look(*ranks, Seen(report=report(1.2)), now=1.3, asked=1.1)
    assert str(found.error) == f"rank 0 {NAMED} of tp at work.py:7: it has left work"
    assert (found.fatal, found.error.rank, found.error.sequence_number) == (True, 0, 5)
    assert [note.split("'")[0] for note in found.error.__notes__] == ["rank 0", "rank 1", "rank 2"]


@pytest.mark.parametrize(
    ("victim", "where"),
    [
        (Seen(report=report(11.3)), "it is at work.py:9 (compute)"),
        (Seen(report=report(11.3), stopped=0.0), "it is stopped (SIGSTOP)"),
        (Seen(report=report(11.3, Collective("barrier", number=2))), "it is in barrier number 2"),
        (Seen(report=report(9.0)), "it doesn't answer"),
        (Seen(report=report(11.3, entered=5)), "it is at work.py:9 (compute)"),  # by elimination
    ],
)
@pytest.mark.parametrize("seen_from_outside", [False, True])
def test_the_rank_that_keeps_others_waiting_is_named(victim, where, seen_from_outside):
    waiting = [waits(11.3), waits(11.3)]
    if not seen_from_outside:
        waiting = [
            failed(10.5, TIMEOUT, RuntimeError("gloo timed out"), collective=REDUCE, report=report(11.3, entered=5))
        ] * 2
    assert look(victim, *waiting, now=11.2, asked=10.6) == Wait(11.7, ask=True, wake=True)
    found = look(victim, *waiting, now=12.0, asked=11.3)
    assert isinstance(found.error, CollectiveTimeout)
    assert str(found.error) == f"rank 0 {NAMED} of tp at work.py:7 within 10 s: {where}"
    assert found.fatal


def test_what_ranks_do_after_being_woken_does_not_count():
    waited = failed(10.0, TIMEOUT, RuntimeError("gloo timed out"), collective=REDUCE)
    woken = failed(10.6, error=KeyError("of the woken"), report=report(10.7), stopped=0.0)
    assert NAMED in str(look(woken, waited, waited, now=11.1, asked=10.55).error)


def test_shm_knows_whom_it_waited_for():
    error = CollectiveTimeout("rank 1", rank=1, collective="barrier", sequence_number=3)
    found = look(BUSY, BUSY, failed(10.0, TIMEOUT, error, collective=REDUCE), now=12.0, asked=11.0)
    assert (found.error.rank, found.error.collective, found.error.sequence_number) == (1, "barrier", 3)


def test_a_timeout_that_names_nobody_says_so():
    alike = [failed(10.0, TIMEOUT, RuntimeError("gloo timed out"), collective=REDUCE)] * 3
    found = look(*alike, now=12.0, asked=11.0)
    assert "a rank did not arrive at all_reduce number 5" in str(found.error)
    assert str(found.error).endswith("could not determine which")
    assert found.error.rank is None


def test_a_stopped_rank_that_nobody_waits_for_is_named():
    alone = Seen(stopped=0.0), Seen(report=report(10.0)), done(1.0)
    assert str(look(*alone, now=10.6).error) == "rank 0 has been stopped (SIGSTOP) for 10 s"
    assert isinstance(look(Seen(stopped=0.0), waits(10.0, since=9.0), now=10.6), Wait)


def test_ranks_that_start_late_are_named():
    ranks = done(1.0), BUSY, Seen(report=report(30.2))
    assert look(*ranks, now=30.0, asked=29.0, deadline=30.0) == Wait(30.5, ask=True, wake=True)
    found = look(*ranks, now=30.6, asked=30.0, deadline=30.0)
    assert str(found.error) == "ranks 1, 2 did not start within 30 s: it doesn't answer"
    assert (found.error.rank, found.error.collective) == (1, "start")
