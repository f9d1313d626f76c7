"""The versions of everything that `make` installs.

python tools/requirements.py lock      writes requirements.lock: the newest versions that go together
python tools/requirements.py lowest    prints the lowest versions that pyproject.toml promises, as constraints
python tools/requirements.py latest    prints torch, the only constraint on the newest
"""

from __future__ import annotations

import json
import pathlib
import platform
import runpy
import subprocess
import sys
import tempfile
import tomllib
import venv

ROOT = pathlib.Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = "transformers,diffusers,dev"

TESTED = runpy.run_path(str(ROOT / "src/multicard/versions.py"))["BY_NAME"]  # a file: multicard isn't installed yet
TORCH = f"torch=={TESTED['torch'].newest}"
"""The same in every environment: torch moves by hand, since every figure has to be measured again with it."""

HEADER = """\
# Everything that `make` installs, pip and the build backend included: ordinary pip reads it as `--constraint`.
# Written by `make lock` with Python {python}, pip {pip}: the newest wheels that go together, of pyproject.toml's ranges
# and {torch}. What only some machines install (torch's CUDA libraries) isn't here: torch itself pins it.
"""
ONLY_SOME_MACHINES = ("cuda-", "nvidia-", "triton")


def resolve(folder: str) -> dict[str, str]:
    """What the newest pip would install into a fresh environment, by name."""
    venv.create(folder, with_pip=True)
    pip = [f"{folder}/bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    subprocess.run([*pip, "--upgrade", "pip"], check=True)
    wanted = ["pip", *PROJECT["build-system"]["requires"], TORCH, f"{ROOT}[{EXTRAS}]"]
    options = ["--dry-run", "--ignore-installed", "--only-binary", ":all:", "--report", "-"]
    report = subprocess.run([*pip, *options, *wanted], check=True, stdout=subprocess.PIPE).stdout
    found = [entry["metadata"] for entry in json.loads(report)["install"]]
    return {entry["name"].lower().replace("_", "-"): entry["version"].partition("+")[0] for entry in found}


def lock() -> None:
    assert sys.version_info[:2] == (3, 11), (
        "a later Python's newest may not exist for 3.11: make lock PYTHON=python3.11"
    )
    with tempfile.TemporaryDirectory() as folder:
        found = resolve(folder)
    found.pop(PROJECT["project"]["name"])
    header = HEADER.format(python=platform.python_version(), pip=found["pip"], torch=TORCH)
    lines = [f"{name}=={found[name]}\n" for name in sorted(found) if not name.startswith(ONLY_SOME_MACHINES)]
    LOCK.write_text(header + "".join(lines))


def lowest() -> None:
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = dict.fromkeys(sum(extras, PROJECT["project"]["dependencies"]))
    print("\n".join(TORCH if line.startswith("torch>=") else line.replace(">=", "==") for line in wanted))


def latest() -> None:
    print(TORCH)


if __name__ == "__main__":
    {"lock": lock, "lowest": lowest, "latest": latest}[sys.argv[1]]()
