"""The house: imports point down, and importing does nothing."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

SOURCE = pathlib.Path(__file__).parents[1] / "src" / "multicard"

FLOORS = [  # what a module may import, anywhere in it: its own floor and those before it in this list
    {"errors", "config", "extras", "memory", "partition", "values", "versions"},
    {"axis", "collectives", "mesh", "place", "device", "join", "rendezvous", "backends", "digest", "replica"},
    {"layers", "quantized", "attention", "guidance", "spatial"},
    {"weights", "models"},
    {"integrations"},
    {"llm", "engines", "diffusion", "progress"},
    {"cli", "__main__"},
]
BESIDE = {"launch", "ranks", "session"}
"""Beside the house: they stand on the waist, and only doors know of them."""
WAIST, DOORS = 1, 5


def may_import(module: str, other: str) -> bool:
    """Whether part ``module`` of multicard may import part ``other``."""
    if other in BESIDE:
        return module in BESIDE or floor(module) >= DOORS
    return floor(other) <= (WAIST if module in BESIDE else floor(module))


def floor(part: str) -> int:
    found = [level for level, names in enumerate(FLOORS) if part in names]
    assert found, f"{part} is on no floor: add it to FLOORS and to CONTRIBUTING.md"
    return found[0]


def graph(source: pathlib.Path) -> dict[str, set[str]]:
    """For every file's module those that it imports, for types and inside functions too."""
    modules = {}
    for path in source.rglob("*.py"):
        parts = (source.name, *path.relative_to(source).with_suffix("").parts)
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {module: imported(path.read_text(), modules) - {module, source.name} for module, path in modules.items()}


def imported(code: str, modules) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(modules)


def arrows_up(files: dict[str, set[str]]) -> list[str]:
    parts = ((file, other, file.split(".")[1], other.split(".")[1]) for file in files for other in files[file])
    return [f"{file} -> {other}" for file, other, part, below in parts if not may_import(part, below)]


FILES = graph(SOURCE)


@pytest.mark.parametrize("file", sorted(set(FILES) - {"multicard"}))
def test_imports_point_down(file):
    assert not arrows_up({file: FILES[file]})


def test_no_circle_between_files():
    try:
        graphlib.TopologicalSorter(FILES).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_what_is_forbidden_is_found(tmp_path):
    house = tmp_path / "multicard"
    for name, code in {
        "axis": "from multicard import ranks",
        "attention/ring": "def f():\n    from multicard.attention import merge",
        "attention/merge": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import multicard.attention.ring",
        "ranks/__init__": "from multicard.layers.linear import x",
        "layers/linear": "from multicard.errors import y",
        "errors": "",
    }.items():
        path = house / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    files = graph(house)
    assert sorted(arrows_up(files)) == [
        "multicard.axis -> multicard.ranks",
        "multicard.ranks -> multicard.layers.linear",
    ]
    with pytest.raises(graphlib.CycleError, match="merge"):
        graphlib.TopologicalSorter(files).prepare()


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
