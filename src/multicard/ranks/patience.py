"""How long everything around ranks is waited for, in seconds, and why that long."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Patience:
    """What :func:`multicard.ranks.judge.judge` goes by.

    Attributes:
        timeout: for one collective; the caller's.
        start_timeout: for all ranks to start and meet; the caller's.
        others: for the other ranks to finish a call in which one has failed. If all do, they live on; ranks that refuse
            a request alike do so within milliseconds. Where others are still computing, the error waits this long.
        refused: the same where a rank refused its input. Then all do, and on a busy machine it would be a pity to end
            ranks that hold a loaded model.
        report: for ranks to report what they are doing: milliseconds, unless C code holds the GIL.
        look: between two questions while some ranks have returned. One costs each rank about a millisecond.
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


SCRIPT_OTHERS = 0.1  # ``others`` of ``multicard run``, which ends all at the first failure: the cause may arrive last
LOOP = 1.0  # between two looks for what is no event: Ctrl-C in the main thread, other hosts, stopped ranks
ASK = 0.1  # to write a question into a rank's pipe: it is short, so a full pipe means that the rank doesn't read
GRACE = 0.3  # for ranks to end by themselves once one has died or the job is closed, so that they can report errors
EXIT_GRACE = 10.0  # for a script's exit handlers, which may write files, once it has ended well on every rank
STORE = 0.25  # between two looks of a host at the job's store: four small requests a second
STORE_NEWS = 4 * STORE  # for a host's failure to reach the store, and on host 0 for others to read it before that ends
STORE_CAUSE = 8 * STORE  # for the failure on another host that one here follows from: both sides have to look
