"""Messages between the caller and its ranks."""

import subprocess
import sys

CYCLES = """
import gc, torch
from multicard.ranks import wire
for _ in range(50):
    message = wire.pack("run", 1, [torch.randn(100) for _ in range(5)])
    cycle = [message]
    cycle.append(cycle)
    del message, cycle
gc.collect()
"""


def test_messages_in_reference_cycles_can_be_collected():
    done = subprocess.run([sys.executable, "-c", CYCLES], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
