"""The house: imports point down, and importing does nothing."""

import ast
import pathlib
import subprocess
import sys

import pytest

SOURCE = pathlib.Path(__file__).parents[1] / "src" / "multicard"

FLOORS = [  # what a module may import at its top level: its own floor and those above it in this list
    {"errors", "config", "partition", "versions"},
    {"mesh", "process_group", "collectives", "digest", "replica", "backends"},
    {"layers", "attention", "guidance"},
    {"weights", "models"},
    {"integrations"},
    {"llm", "diffusion"},
    {"cli", "__main__"},
]
BESIDE = {"launch": 1, "_rank": 1, "ranks": 1}  # beside the house, as high as its second floor


def floor(module: str) -> int:
    if module in BESIDE:
        return BESIDE[module]
    found = [level for level, names in enumerate(FLOORS) if module in names]
    assert found, f"{module} is on no floor: add it to FLOORS and to CONTRIBUTING.md"
    return found[0]


def imported(path: pathlib.Path) -> set[str]:
    """Parts of multicard that a file imports anywhere in it, functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "multicard":
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("multicard."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names.update(a.name.split(".")[1] for a in node.names if a.name.startswith("multicard."))
    return names


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path):
    module = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if module == "__init__":
        return
    above = {name for name in imported(path) - {"__version__"} if floor(name) > floor(module)}
    assert not above, f"{path.name} imports {sorted(above)}, which are above it"


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_importing_does_nothing():
    done = run_python(
        "import os, sys, threading; before = dict(os.environ)\n"
        "import multicard\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "for name in multicard.__all__: getattr(multicard, name)\n"
        "import torch.distributed as dist\n"
        "assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())\n"
        "assert not dist.is_initialized() and threading.active_count() == 1\n"
        "assert not {'transformers', 'diffusers', 'matplotlib'} & set(sys.modules)\n"
    )
    assert done.stdout == done.stderr == ""


def test_the_ground_needs_no_torch():
    run_python(
        "import sys, multicard.config, multicard.partition, multicard.errors, multicard.versions\n"
        "assert 'torch' not in sys.modules\n"
    )
