"""How long everything around ranks is waited for, in seconds, and why that long."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Patience:
    """What :func:`multicard.ranks.judge.judge` waits for.

    Attributes:
        timeout: for one collective; the caller's.
        start_timeout: for all ranks to start and meet; the caller's.
        others: after one rank has failed, for the others to finish the call too. If all do, they can go on. Ranks that
            refuse a request alike do so within milliseconds, and where others are still computing, this is how long
            the caller waits for the error.
        refused: the same where a rank refused its input. Then all do, and giving up early on a busy machine would end
            ranks that hold a loaded model.
        report: for ranks to report what they are doing. They do so within milliseconds unless C code holds the GIL or
            the machine is busy.
        look: between two questions while some ranks have returned and others haven't. A question costs each rank about
            a millisecond of its Python.
        looks: so many questions within ``timeout`` while nothing seems wrong, but never closer than ``look``.
        first_look: between the first two questions after a failure, to see at once that another rank waits for the one
            that failed. The pauses double.
    """

    timeout: float = 60.0
    start_timeout: float = 300.0
    others: float = 0.5
    refused: float = 5.0
    report: float = 0.5
    look: float = 0.5
    looks: int = 20
    first_look: float = 0.02


SCRIPT_OTHERS = 0.1
"""``Patience.others`` of ``multicard run``: a script ends at its first failure, so this only has to be long enough for
the cause to arrive when its consequence was faster."""

LOOP = 1.0
"""At most between two looks at what no event tells of: Ctrl-C in the main thread, other hosts, stopped ranks."""

ASK = 0.1
"""To write a question into a rank's pipe: it is short, so a full pipe means that the rank doesn't read."""

GRACE = 0.3
"""For ranks to end by themselves once one has died or the job is closed, then SIGKILL: enough to report an error."""

EXIT_GRACE = 10.0
"""For a script's own exit handlers, which may write files, once it has ended well on every rank."""

STORE = 0.25
"""Between two looks of a host at the job's store: four small requests a second and host."""

STORE_NEWS = 4 * STORE
"""For this host's failure to reach the store, and on host 0 for the others to read it before the store ends."""

STORE_CAUSE = 8 * STORE
"""For the failure on another host that one here follows from: both have to look at the store, and one to write."""
