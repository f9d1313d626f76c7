"""Ctrl-C while another thread than the main one waits for ranks: Python tells the main thread alone."""

from __future__ import annotations

import sys
import threading
import traceback


def reached_main_thread() -> bool:
    """Whether Ctrl-C has interrupted the main thread, which may now wait for the thread that asks.

    It does so in leaving a block that was interrupted (``with ThreadPoolExecutor()``, ``asyncio.run``), where the
    KeyboardInterrupt is still active, or at the interpreter's exit, once that has printed it.
    """
    main = threading.main_thread()
    if main is threading.current_thread() or main.ident is None:
        return False
    active: object = sys._current_exceptions().get(main.ident)
    raised = active[1] if isinstance(active, tuple) else active  # the exception itself since Python 3.12
    if isinstance(raised, KeyboardInterrupt):
        return True
    stack = traceback.walk_stack(sys._current_frames().get(main.ident))
    leaving = any(frame.f_code is threading._shutdown.__code__ for frame, _ in stack)  # type: ignore[attr-defined]
    return leaving and getattr(sys, "last_type", None) is KeyboardInterrupt
