"""Ranks as child processes that answer calls; who waits for them gets every answer or the first real failure."""

from __future__ import annotations

import collections
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from multicard.errors import CheckpointError, ConfigError, RankError, UnsupportedError
from multicard.ranks import environment, failure, hang, interrupt, starter, wire
from multicard.ranks.calls import Call, Calls
from multicard.ranks.failure import Failure
from multicard.ranks.hosts import POLL, Neighbours
from multicard.ranks.logs import Logs
from multicard.ranks.settings import Settings
from multicard.ranks.supervisor import Supervisor
from multicard.ranks.watch import ANSWER, Watch
from multicard.rendezvous import host_store

SETTLE = 0.5
"""Seconds that the other ranks have to finish a call in which one has failed, before all are ended."""

REFUSED = (ConfigError, UnsupportedError, CheckpointError)
REFUSED_SETTLE = 5.0
"""The same where a rank refused its input: all do, and a busy machine is no reason to lose a loaded model."""


class Children:
    """A job's ranks. Calls from several threads take turns.

    Attributes:
        told: whether a call has raised for the ranks' end.
    """

    def __init__(self, settings: Settings, settle: float = SETTLE) -> None:
        self.settings = settings
        self.told = False
        self._owner = os.getpid()
        self._settle_time = settle
        self._ranks = settings.ranks
        self._size = len(self._ranks)
        self._turn = threading.Lock()
        self._later: collections.deque[tuple[str, int]] = collections.deque()
        hosts = settings.hosts
        server = starter.server(environment.shared(settings))  # it imports torch while the next line does
        self._store, port = None, hosts.port
        if hosts.index == 0:
            self._store, port = host_store(settings.start_timeout, hosts.address, hosts.port)
        self._neighbours = (
            Neighbours(hosts, port, settings.start_timeout, settings.timeout) if hosts.count > 1 else None
        )
        self._supervisor = Supervisor(
            {rank: environment.of_rank(settings, rank, port) for rank in self._ranks},
            Logs(self._ranks, settings.log_dir, settings.console, settings.log_mode),
            server,
            settings.start_timeout,
        )
        self._calls = Calls(self._supervisor)
        self._watch = Watch(self._supervisor, self._calls, settings)

    @property
    def pids(self) -> list[int]:
        """Process ids by rank."""
        return [process.pid for process in self._supervisor.processes.values()]

    @property
    def broken(self) -> RankError | None:
        """Why they take no further calls, or None."""
        return self._calls.broken

    @property
    def alive(self) -> bool:
        """Whether they take further calls."""
        return self.broken is None and not self._supervisor.dead

    def start(self) -> float:
        """Wait until all ranks have started; returns the moment by which they have to meet."""
        deadline = time.monotonic() + self.settings.start_timeout
        self.finish(self.begin("start", None, "start"), deadline)
        return deadline

    def join(self) -> None:
        """Wait until all ranks have started, then let them meet; within ``start_timeout`` in all."""
        deadline = self.start()
        self.finish(self.begin("join", self._joining, "init_mesh"), deadline)

    @property
    def _joining(self) -> dict[str, Any]:
        wanted = self.settings
        return {"config": wanted.config, "backend": wanted.backend, "device": wanted.device, "timeout": wanted.timeout}

    # calls

    def run(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """``fn(mesh, ...)`` on every rank: values by rank."""
        return [message.load() for message in self.call("run", (fn, args, kwargs), _name(fn))]

    def keep(self, key: int, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """The same, where the value stays until it is dropped."""
        self.call("keep", (key, fn, args, kwargs), _name(fn))

    def drop(self, key: int) -> None:
        """Forget what is kept, before the next command; safe in a finalizer."""
        self._later.append(("drop", key))

    def stream(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
        """What rank 0's generator yields; ranks are one item ahead."""
        call = self.begin("open", (fn, args, kwargs), _name(fn))
        self.finish(call)
        try:
            self.step("next", call, _name(fn))
            while (answer := self.finish(call)[0]).kind != "end":
                self.step("next", call, _name(fn))
                yield answer.load()
        finally:
            self._later.append(("close", call))

    def call(self, kind: str, value: Any, label: str) -> list[wire.Message]:
        """Send one command to every rank and wait for their answers, by rank; ``label`` names it in errors."""
        return self.finish(self.begin(kind, value, label))

    def begin(self, kind: str, value: Any, label: str) -> int:
        """Send a command to every rank; returns the call's number, for :meth:`step` and :meth:`finish`."""
        self._refuse_if_forked()
        message = wire.pack(kind, 0, value)
        with self._turn:
            self._refuse_if_broken()
            self._watch.begin()
            number = self._calls.open(label)
            self._send_all(dataclasses.replace(message, call=number))
            return number

    def step(self, kind: str, call: int, label: str) -> None:
        """Send a further command of a call that has begun."""
        self._refuse_if_forked()
        with self._turn:
            self._refuse_if_broken()
            self._calls.under_way[call] = Call(label)
            self._send_all(wire.Message(kind, call))

    def finish(self, call: int, deadline: float | None = None) -> list[wire.Message]:
        """Every rank's next answer to ``call``, by rank. Raises the first real failure."""
        with self._turn:
            try:
                failures = self._wait(call, deadline)
                answers = self._calls.under_way.pop(call).answers
            except BaseException as error:
                self.end(f"interrupted by {type(error).__name__}")
                self.told = True
                raise
        if failures:
            self.told = self.broken is not None
            raise self._where_it_began(failure.first_real(failures)).error
        return [message for _, message in sorted(answers.items()) if isinstance(message, wire.Message)]

    def meet_hosts(self) -> None:
        """Wait until every host's ranks are done. Raises what went wrong elsewhere."""
        if self._neighbours is not None and (elsewhere := self._neighbours.finish()) is not None:
            raise elsewhere.error

    def end(self, why: str | BaseException, grace: float = 0.0) -> None:
        """End all ranks; ``why`` is what later calls are told. In a process forked from theirs nothing happens."""
        if os.getpid() != self._owner:
            return
        self._calls.broken = self.broken or _ended(why)
        self._supervisor.end(grace)
        if self._neighbours is None:  # other hosts have yet to read there why
            self._store = None

    def _refuse_if_forked(self) -> None:
        if os.getpid() != self._owner:
            raise UnsupportedError(f"these ranks are process {self._owner}'s: a process forked from it starts its own")

    def _refuse_if_broken(self) -> None:
        if self.broken is None and self._supervisor.dead:
            self.end(self._calls.obituary(next(iter(self._supervisor.dead))).error)
        if self.broken is not None:
            self.told = True
            raise self.broken.with_traceback(None)

    def _send_all(self, message: wire.Message) -> None:
        while self._later:
            kind, call = self._later.popleft()
            self._send_all(wire.Message(kind, call))
        if message.kind == "close" and message.call in self._calls.under_way:
            self._calls.under_way[message.call].abandoned = True
        for rank in self._ranks:
            self._supervisor.send(rank, message, self.settings.timeout)

    # waiting

    def _wait(self, number: int, deadline: float | None) -> list[Failure]:
        """Until every rank has answered the call or one has failed; returns the failures."""
        mine, interrupted = self._calls.under_way[number], interrupt.reached_main_thread()
        while True:
            for call in list(self._calls.under_way.values()):
                if call.failures and not call.settled:
                    self._settle(call)
            if mine.failures or len(mine.answers) == self._size:
                return mine.failures
            left = 1.0 if deadline is None else min(1.0, deadline - time.monotonic())
            if left <= 0:
                return [self._late(mine)]
            self._calls.listen(left)
            self._watch.look(mine)
            if self._neighbours is not None and (elsewhere := self._neighbours.failure) is not None:
                self.end(elsewhere.error)
                return [elsewhere]
            if not interrupted and interrupt.reached_main_thread():
                raise KeyboardInterrupt
            self._calls.forget_abandoned(self._size)

    def _settle(self, call: Call) -> None:
        """A rank has failed a call: give the others the time to finish it too, and end all if they can't.

        The ranks live on where all have finished the call and have entered the same collectives in it: then nothing
        of it is left under way that a later call could mistake for its own.
        """
        call.settled = True
        self._let_finish(call)
        first = failure.first_real(call.failures)
        if first.kind == failure.TIMEOUT and self.broken is None and not self._supervisor.dead:
            stopped = self._watch.wake_stopped()
            first = hang.explain(call.failures, self._calls.inspect(ANSWER), stopped, self.settings)
            call.answers = {first.rank: first}
        if first.spoils or len(call.answers) < self._size or not self.alive or not self._watch.in_step():
            self.end(first.error)

    def _let_finish(self, call: Call) -> None:
        """Wait for the other ranks' answers, unless a rank is dead or one of them waits for what can't come."""
        first = failure.first_real(call.failures)
        patience = REFUSED_SETTLE if isinstance(first.error, REFUSED) else self._settle_time
        deadline, pause = time.monotonic() + patience, 0.02
        while len(call.answers) < self._size and (left := deadline - time.monotonic()) > 0:
            own = failure.first_real(call.failures).kind == failure.OWN
            if own and (self._supervisor.dead or self._watch.waits_in_vain(call) is not None):
                return
            self._calls.listen_to(call, self._size, min(left, pause))
            pause *= 2

    def _late(self, call: Call) -> Failure:
        """Ranks that did not start in time."""
        missing = [rank for rank in self._ranks if rank not in call.answers]
        stopped = self._watch.wake_stopped()
        late = hang.late(missing, self._calls.inspect(ANSWER), stopped, self.settings)
        self.end(late.error)
        return late

    def _where_it_began(self, first: Failure) -> Failure:
        """This host's first failure, or the one on another host that it follows from; others are told."""
        if self._neighbours is None:
            return first
        if first.kind != failure.OWN and (elsewhere := self._neighbours.await_failure(8 * POLL)) is not None:
            return elsewhere
        self._neighbours.tell(first.error)
        return first


def _ended(why: str | BaseException) -> RankError:
    """What calls are told after the ranks' end; it names the rank and the signal where ``why`` does."""
    cause = why if isinstance(why, RankError) else getattr(why, "__cause__", None)
    known = {name: getattr(cause, name, None) for name in ("rank", "signal", "stderr")}
    text = cause if isinstance(cause, RankError) else why
    return RankError(f"these ranks have ended ({text}): restart() starts new ones", **known)


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", type(fn).__name__)
