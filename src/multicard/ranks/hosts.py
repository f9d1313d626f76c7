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

_FAILED, _DONE = "multicard/failed", "multicard/done"


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The hosts of a job.

    Attributes:
        count: how many; each runs the same number of ranks.
        index: this host's number.
        address: of host 0; the store listens on this address only.
        port: of the store; 0, any free port, is allowed only with one host.
        interface: the network interface for gloo; None: the one that leads to ``address``.
    """

    count: int = 1
    index: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    interface: str | None = None


class Neighbours:
    """This host's view of the other hosts' parents.

    Args:
        hosts: the job's hosts.
        port: the store's port.
        start_timeout: seconds for the first answer from the store.
        timeout: seconds without a further answer after which the link counts as broken.
    """

    def __init__(self, hosts: Hosts, port: int, start_timeout: float, timeout: float) -> None:
        import torch.distributed  # noqa: F401  before ranks start, which may fail soon

        self._hosts, self._port = hosts, port
        self._start_timeout = self._limit = start_timeout
        self._timeout = timeout
        self._heard = time.monotonic()
        self._theirs: dict[str, Any] | None = None  # another host's failure, read from the store
        self._ours: dict[str, Any] | None = None  # this host's failure, to be written
        self._finished, self._all_done, self._left, self._wake = (threading.Event() for _ in range(4))
        threading.Thread(target=self._watch, name="multicard-hosts", daemon=True).start()

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
            error = RankError(f"no answer from {self._hosts.address}:{self._port} for {silent:.0f} s: is the link up?")
            return Failure(0, OWN, now, error)
        return None

    def tell(self, error: BaseException) -> None:
        """Write this host's failure for the others; waits at most ``patience.STORE_NEWS``."""
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        self._ours = {"message": message, "rank": getattr(error, "rank", None), "host": self._hosts.index}
        self._wake.set()
        self._left.wait(patience.STORE_NEWS)
        if self._hosts.index == 0:  # the store ends with this process: let the others read it first
            time.sleep(patience.STORE_NEWS)

    def await_failure(self, seconds: float) -> Failure | None:
        """The failure of another host, once it is known; None if ``seconds`` have passed."""
        deadline = time.monotonic() + seconds
        while (found := self.failure) is None and time.monotonic() < deadline:
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
                self._hosts.address, self._port, is_master=False, wait_for_workers=False, timeout=limit
            )
            self._exchange(store)
        except Exception:  # the connection is lost; ``failure`` notices the silence
            if self._finished.is_set():  # host 0 closes the store when all are done
                self._all_done.set()
        self._left.set()

    def _exchange(self, store: Any) -> None:
        """Write this host's failure and read the others', until a host fails or all are done."""
        said_done = False
        while not self._all_done.is_set():
            if self._finished.is_set() and not said_done:
                store.add(_DONE, 1)
                said_done = True
            failed = store.check([_FAILED])
            if self._ours is not None and not failed:
                store.set(_FAILED, json.dumps(self._ours))
            elif self._ours is None and failed:
                self._theirs = json.loads(store.get(_FAILED))
            if self._ours is not None or failed:
                return
            if said_done and store.add(_DONE, 0) == self._hosts.count:
                self._all_done.set()
            self._heard, self._limit = time.monotonic(), self._timeout
            self._wake.wait(patience.STORE)
            if said_done:
                time.sleep(patience.STORE / 5)
