"""How the parents of one job's ranks on several hosts tell each other which rank failed, and when all are done.

They use the job's store, with JSON, on a separate connection and thread, so that a broken link blocks nothing else.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import threading
import time
from typing import Any

from multicard.errors import RankError
from multicard.ranks import patience
from multicard.ranks.failure import OWN, Failure

_FAILED, _DONE, _ALIVE = "multicard/failed", "multicard/done", "multicard/alive"


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The hosts of a job.

    Attributes:
        count: how many; each runs the same number of ranks.
        index: this one's number.
        address: of host 0, where the store listens, on that address only.
        port: there; with one host nothing listens, and 0 is right.
        interface: the network interface for gloo; None: the one that leads to ``address``.
    """

    count: int = 1
    index: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    interface: str | None = None


class Neighbours:
    """This host's view of the other hosts' parents.

    The store has ``start_timeout`` seconds for its first answer; ``timeout`` without another mean that the link is cut.
    Each host counts up a number of its own there, as a sign of life. ``ranks`` are those of each host.
    """

    def __init__(self, hosts: Hosts, ranks: int, start_timeout: float, timeout: float) -> None:
        import torch.distributed  # noqa: F401  before ranks start: they are quick, and the watch has to be as early

        self._hosts, self._ranks = hosts, ranks
        self._signs: dict[int, tuple[int, float]] = {}  # each other host's number, and when it last changed
        self._connected = self._store_is_gone = False
        self._start_timeout = self._limit = start_timeout
        self._timeout = timeout
        self._heard = time.monotonic()
        self._theirs: dict[str, Any] | None = None  # the failure that another host has written
        self._ours: dict[str, Any] | None = None  # the one to write
        self._finished, self._all_done, self._wake = (threading.Event() for _ in range(3))
        self._thread = threading.Thread(target=self._watch, name="multicard-hosts", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> Failure | None:
        """The failure of another host, or of the link, if there is one."""
        now = time.monotonic()
        silent = now - self._heard
        if self._theirs is not None:
            rank = self._theirs["rank"]
            error = RankError(f"{self._theirs['message']} (on host {self._theirs['host']})", rank=rank)
            return Failure(rank or 0, OWN, now, error)
        if silent > self._limit and not self._all_done.is_set():
            error = RankError(
                f"no answer from {self._hosts.address}:{self._hosts.port} for {silent:.0f} s: is the link cut?"
            )
            return Failure(0, OWN, now, error)
        return self.lost(self._timeout)

    def lost(self, seconds: float, broke: float | None = None) -> Failure | None:
        """A host without a sign of life for so long: host 0 where its store is closed or doesn't answer.

        ``broke``: when a connection between ranks broke. From then on a host that has given no sign yet counts too:
        ranks may meet before their parents, which repeat an early connection at growing intervals.
        """
        now = time.monotonic()
        if self._all_done.is_set() or not (self._connected or broke):
            return None
        others = [index for index in range(self._hosts.count) if index != self._hosts.index]
        last = {index: self._signs.get(index, (0, broke or now))[1] for index in others}
        silent = {index: now - moment for index, moment in last.items() if now - moment > seconds}
        unanswered = now - (self._heard if self._connected else broke or now)
        if self._store_is_gone:
            index, why = 0, "has closed the job's store"
        elif unanswered > seconds:
            index, why = 0, f"has not answered for {unanswered:.1f} s"
        elif silent:
            index = min(silent)
            why = f"has given no sign of life for {silent[index]:.1f} s"
        else:
            return None
        rank = index * self._ranks
        error = RankError(
            f"host {index} (ranks {rank} to {rank + self._ranks - 1}) {why}: multicard was killed there, or the link "
            "is cut",
            rank=rank,
        )
        return Failure(rank, OWN, now, error)

    def tell(self, error: BaseException) -> None:
        """Write this host's failure for the others; waits at most ``patience.STORE_NEWS``."""
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        self._ours = {"message": message, "rank": getattr(error, "rank", None), "host": self._hosts.index}
        self._wake.set()
        self._thread.join(patience.STORE_NEWS)
        if self._hosts.index == 0:  # the store ends with this process: let the others read it first
            time.sleep(patience.STORE_NEWS)

    def await_failure(self, seconds: float, broke: float | None) -> Failure | None:
        """The failure or the loss of another host, once it is known; None if ``seconds`` have passed."""
        deadline = time.monotonic() + seconds
        while (found := self.failure or self.lost(patience.STORE_LOST, broke)) is None and time.monotonic() < deadline:
            time.sleep(patience.STORE / 10)
        return found

    def finish(self) -> Failure | None:
        """Wait until every host is done; returns the failure of another host, if there is one."""
        self._finished.set()
        self._wake.set()
        while not self._all_done.wait(patience.STORE):
            if (failure := self.failure) is not None:
                return failure
        return None

    def _watch(self) -> None:
        import torch.distributed as dist

        limit = datetime.timedelta(seconds=self._start_timeout)
        try:
            store = dist.TCPStore(
                self._hosts.address, self._hosts.port, is_master=False, wait_for_workers=False, timeout=limit
            )
            self._connected, self._heard = True, time.monotonic()
            self._exchange(store)
        except Exception:  # the connection is lost; ``failure`` notices the silence
            if self._finished.is_set():  # host 0 closes the store when all are done
                self._all_done.set()
            self._store_is_gone = self._connected

    def _exchange(self, store: Any) -> None:
        """Write this host's failure and read the others', until a host fails or all are done."""
        said_done = False
        while not self._all_done.is_set():
            if self._finished.is_set() and not said_done:
                store.add(_DONE, 1)
                said_done = True
            if store.check([_FAILED]):
                self._theirs = None if self._ours else json.loads(store.get(_FAILED))
                return
            if self._ours:
                store.set(_FAILED, json.dumps(self._ours))
                return
            if said_done and store.add(_DONE, 0) == self._hosts.count:
                self._all_done.set()
            self._heard, self._limit = time.monotonic(), self._timeout
            self._look_for_signs(store)
            self._wake.wait(patience.STORE)
            if said_done:
                time.sleep(patience.STORE / 5)

    def _look_for_signs(self, store: Any) -> None:
        for index in range(self._hosts.count):
            number = store.add(f"{_ALIVE}/{index}", int(index == self._hosts.index))
            if index != self._hosts.index and number and self._signs.get(index, (0, 0.0))[0] != number:
                self._signs[index] = number, time.monotonic()
