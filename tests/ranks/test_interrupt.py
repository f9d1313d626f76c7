"""Ctrl-C reaches threads that wait for ranks, however the main thread waits for them."""

import subprocess
import sys

import pytest

PROGRAM = """
import asyncio, os, signal, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from multicard.ranks import interrupt

def work():
    time.sleep(1)  # until the main thread waits
    if interrupt.reached_main_thread():
        sys.exit("too early")
    os.kill(os.getpid(), signal.SIGINT)
    while not interrupt.reached_main_thread():
        time.sleep(0.01)

{ending}
"""
ENDINGS = {
    "thread": "thread = threading.Thread(target=work)\nthread.start()\nthread.join()",
    "thread that nobody joins": "threading.Thread(target=work).start()\ntime.sleep(60)",
    "pool": "with ThreadPoolExecutor() as pool:\n    pool.submit(work).result()",
    "pool that nobody leaves": "ThreadPoolExecutor().submit(work).result()",
    "asyncio": "asyncio.run(asyncio.to_thread(work))",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_interrupted_main_thread_is_seen(ending):
    """Without being seen it would go on forever; where the main thread was joining, Python 3.11 ends by itself."""
    code = PROGRAM.replace("{ending}", ENDINGS[ending])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "KeyboardInterrupt" in done.stderr
    assert "too early" not in done.stderr
