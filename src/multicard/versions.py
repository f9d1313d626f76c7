"""Other libraries: the versions that the tests ran with, and the versions installed here.

pyproject.toml's lower bounds, ``multicard info`` and docs/versions.md follow this table; a test checks that they agree.
"""

from __future__ import annotations

import importlib.metadata
import re
from typing import NamedTuple


class Tested(NamedTuple):
    """A library with the lowest and the newest version that the tests ran with."""

    name: str
    lowest: str
    newest: str
    promised: str = ""  # pyproject.toml's bound, if it is older than the lowest version that could be tested


TABLE = (
    Tested("torch", "2.13.0", "2.13.0", promised="2.11"),
    Tested("transformers", "5.21.0", "5.24.0"),
    Tested("diffusers", "0.40.0", "0.42.1"),
    Tested("accelerate", "1.1.0", "1.15.0"),
    Tested("peft", "0.21.0", "0.21.2"),
    Tested("tokenizers", "0.23.1", "0.23.3"),
    Tested("cloudpickle", "3.0.0", "3.1.3"),
    Tested("numpy", "1.26.0", "2.4.6"),
    Tested("pillow", "10.0.0", "13.0.0"),
    Tested("jinja2", "3.1.0", "3.1.6"),
    Tested("lazy-loader", "0.6", "0.6"),
    Tested("psutil", "5.9.4", "7.2.2"),
    Tested("rich", "13.7.0", "15.0.0"),
    Tested("typer", "0.15.0", "0.29.2"),
    Tested("xxhash", "3.0.0", "4.1.0"),
)
BY_NAME = {tested.name: tested for tested in TABLE}


def installed(name: str) -> str | None:
    """The version of ``name`` that is installed, if any is."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(name: str) -> str:
    """The installed version and the tested ones: ``transformers 5.24.0; tested: 5.21.0 to 5.24.0``."""
    version = installed(name)
    here = f"{name} {version}" if version else f"{name} isn't installed"
    tested = BY_NAME.get(name)
    if tested is None:
        return here
    return f"{here}; tested: {' to '.join(dict.fromkeys((tested.lowest, tested.newest)))}"


def untested(name: str) -> str | None:
    """How the installed version is outside the tested range (it still runs); None if it is within."""
    version, tested = installed(name), BY_NAME.get(name)
    if version is None or tested is None:
        return None
    if release(version) > release(tested.newest):
        return f"newer than {tested.newest}, the newest tested"
    if release(version) < release(tested.lowest):
        return f"older than {tested.lowest}, the lowest tested"
    return None


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, to compare: ``2.13.0+cpu`` is (2, 13), and so is ``2.13``."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, re.sub(r"(\.0)+$", "", numbers[0]).split("."))) if numbers else ()
