"""The example network out of parallel layers, with sizes that divide by nothing."""

import pathlib
import re
import subprocess
import sys

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "build_your_own.py"


def test_it_says_how_far_it_is_from_one_card():
    sizes = {"vocab": 1003, "hidden": 40, "ffn": 177, "layers": 2, "heads": 5, "tokens": 7}
    flags = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "multicard", "run", "--tp", "3", str(EXAMPLE), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"1\.up\s+ColumnParallelLinear\s+\(1, 7, 59\)", done.stdout)
    assert re.search(r"tp=3: largest difference from one card \S+e-0[6-9]", done.stdout)
