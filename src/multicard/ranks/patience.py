"""All time limits of waits for ranks, in seconds, and the reasons for them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Patience:
    """The limits of :func:`multicard.ranks.judge.judge`.

    Attributes:
        timeout: for one collective; the caller's.
        start_timeout: for all ranks to start and meet; the caller's.
        others: for the other ranks to finish a call in which one has failed. If all do, the ranks stay in use; ranks
            that all refuse a request do so within milliseconds. If others are still computing, the error is delayed
            this long.
        refused: the same if a rank refused its input. Then all ranks do, and on a slow, busy machine ranks with a
            loaded model shouldn't be ended for it.
        report: for ranks to report what they are doing: milliseconds, unless C code holds the GIL.
        look: between two questions while some ranks have returned. A question costs each rank about a millisecond.
        looks: questions within ``timeout`` while nothing seems wrong, but no closer than ``look``.
        first_look: between the first two questions after a failure, to see whether another rank waits for the one that
            failed; the pauses double.
    """

    timeout: float = 60.0
    start_timeout: float = 300.0
    others: float = 0.5
    refused: float = 5.0
    report: float = 0.5
    look: float = 0.5
    looks: int = 20
    first_look: float = 0.02


SCRIPT_OTHERS = 0.1  # ``others`` for ``multicard run``, where one failure ends all ranks; the cause may come last
LOOP = 1.0  # between two checks of Ctrl-C, other hosts and stopped ranks, which give no event
ASK = 0.1  # to write a question into a rank's pipe: it is short, so a full pipe means that the rank doesn't read
GRACE = 0.3  # for ranks to end by themselves once one has died or the job is closed, so that they can report errors
EXIT_GRACE = 10.0  # for a script's exit handlers, which may write files, once it has ended well on every rank
STORE = 0.25  # between two reads of the job's store by a host: four small requests a second
STORE_NEWS = 4 * STORE  # for a host's failure to reach the store, and on host 0 for others to read it before that ends
STORE_LOST = 5 * STORE  # without a sign of life from a host, once something has failed here
STORE_CAUSE = 10 * STORE  # for the failure on another host that caused the one here: both hosts access the store
