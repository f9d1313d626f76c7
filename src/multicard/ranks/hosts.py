"""What the parents of one job's ranks on several hosts tell each other: who failed, and when all are done.

It goes through the job's store, as JSON, on a connection and a thread of their own: a cut link blocks nobody else.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import threading
import time
from typing import Any

from multicard.errors import RankError
from multicard.ranks.failure import OWN, Failure

POLL = 0.25
"""Seconds between two looks at the store."""

_FAILED, _DONE = "multicard/failed", "multicard/done"


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The hosts of a job.

    Attributes:
        count: how many; each runs the same number of ranks.
        index: this one's number.
        address: of host 0, where the store listens, on that address only.
        port: there; 0, one that is free, can only be meant with one host.
        interface: the network interface for gloo; None: the one that leads to ``address``.
    """

    count: int = 1
    index: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    interface: str | None = None


class Neighbours:
    """The other hosts' parents, as this one sees them.

    Args:
        hosts: the job's.
        port: the store's.
        start_patience: seconds for the first answer from the store.
        patience: seconds without another after which the link counts as cut.
    """

    def __init__(self, hosts: Hosts, port: int, start_patience: float, patience: float) -> None:
        import torch.distributed  # noqa: F401  before ranks start: they are quick, and the watch has to be as early

        self._hosts, self._port = hosts, port
        self._start_patience = self._patience = start_patience
        self._next_patience = patience
        self._heard = time.monotonic()
        self._told: dict[str, Any] | None = None
        self._news: dict[str, Any] | None = None
        self._finished, self._all_done, self._left, self._wake = (threading.Event() for _ in range(4))
        threading.Thread(target=self._watch, name="multicard-hosts", daemon=True).start()

    @property
    def failure(self) -> Failure | None:
        """What went wrong elsewhere, if anything."""
        silent = time.monotonic() - self._heard
        if self._told is not None:
            told = self._told
            error = RankError(f"{told['message']} (on host {told['host']})", rank=told["rank"])
            return Failure(told["rank"] or 0, OWN, time.monotonic(), error)
        if silent > self._patience and not self._all_done.is_set():
            error = RankError(f"no answer from {self._hosts.address}:{self._port} for {silent:.0f} s: is the link cut?")
            return Failure(0, OWN, time.monotonic(), error)
        return None

    def tell(self, error: BaseException) -> None:
        """Tell the others that this host has failed; not waited for longer than a moment."""
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        self._news = {"message": message, "rank": getattr(error, "rank", None), "host": self._hosts.index}
        self._wake.set()
        self._left.wait(4 * POLL)
        if self._hosts.index == 0:  # the store ends with this process: let the others read it first
            time.sleep(4 * POLL)

    def await_failure(self, seconds: float) -> Failure | None:
        """What went wrong elsewhere, once it is known or ``seconds`` have passed."""
        deadline = time.monotonic() + seconds
        while (found := self.failure) is None and time.monotonic() < deadline:
            time.sleep(POLL / 10)
        return found

    def finish(self) -> Failure | None:
        """Wait until every host is done; returns what went wrong elsewhere meanwhile."""
        self._finished.set()
        self._wake.set()
        while not self._all_done.wait(POLL):
            if (failure := self.failure) is not None:
                return failure
        return None

    def _watch(self) -> None:
        import torch.distributed as dist

        try:
            store = dist.TCPStore(
                self._hosts.address,
                self._port,
                is_master=False,
                wait_for_workers=False,
                timeout=datetime.timedelta(seconds=self._start_patience),
            )
            said = False
            while not self._all_done.is_set():
                if self._finished.is_set() and not said:
                    store.add(_DONE, 1)
                    said = True
                if self._news is not None:
                    if not store.check([_FAILED]):
                        store.set(_FAILED, json.dumps(self._news))
                    break
                if store.check([_FAILED]):
                    self._told = json.loads(store.get(_FAILED))
                    break
                if said and store.add(_DONE, 0) == self._hosts.count:
                    self._all_done.set()
                self._heard, self._patience = time.monotonic(), self._next_patience
                self._wake.wait(POLL)
                if said:
                    time.sleep(POLL / 5)
        except Exception:  # the connection is gone: silence says it, once it has lasted
            if self._finished.is_set():  # host 0 closes the store when all are done
                self._all_done.set()
        self._left.set()
