"""Messages between the caller and its ranks."""

import pickle
import subprocess
import sys
import types

from multicard.ranks import wire

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


def code_objects(code):
    """``code`` and all that is defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from code_objects(constant)


def test_functions_keep_the_file_that_call_sites_name():
    def outer():
        class Inner:
            def method(self):
                return lambda: 1

        return Inner, [x + 1 for x in (1, 2)]

    sent = outer.__code__
    arrived = pickle.loads(wire.dumps(outer)).__code__
    assert arrived is not sent
    assert [each.co_name for each in code_objects(sent)][:4] == ["outer", "Inner", "method", "<lambda>"]
    assert [(each.co_filename, *each.co_lines()) for each in code_objects(arrived)] == [
        (__file__, *each.co_lines()) for each in code_objects(sent)
    ]
