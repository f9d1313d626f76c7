"""Every example in README.md and docs/ runs as it is printed.

A page's ```python blocks run in order as one program. A block whose fence says how (```python multicard run --tp 2)
is a script of its own, started with that command. ```console blocks are command lines after `$`, each must exit with 0.
"""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BIN = pathlib.Path(sys.executable).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)[ ]?(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: pathlib.Path, language: str) -> list[tuple[str, str]]:
    return [(how, code) for lang, how, code in FENCE.findall(page.read_text()) if lang == language]


def seam(page: pathlib.Path) -> list:
    return [pytest.mark.seam] if page.name == "README.md" else []


def programs() -> list:
    found = []
    for page in PAGES:
        python = blocks(page, "python")
        plain = "\n".join(code for how, code in python if not how)
        if plain:
            found.append(pytest.param([sys.executable], plain, id=page.stem, marks=seam(page)))
        for i, (how, code) in enumerate((how, code) for how, code in python if how):
            found.append(pytest.param(shlex.split(how), code, id=f"{page.stem}-{i}", marks=seam(page)))
    return found


def commands() -> list:
    lines = [(page, line) for page in PAGES for _, code in blocks(page, "console") for line in code.splitlines()]
    return [
        pytest.param(line[2:], id=f"{page.stem}: {line[2:]}", marks=seam(page))
        for page, line in lines
        if line.startswith("$ ")
    ]


def run(command: list[str] | str, **kwargs) -> None:
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize(("how", "code"), programs())
def test_programs_run(how, code, tmp_path):
    script = tmp_path / "example.py"
    script.write_text(code)
    run([*how, str(script)])


@pytest.mark.parametrize("line", commands())
def test_commands_run(line):
    run(line, shell=True)


def test_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken


def test_each_promise_of_the_security_page_names_tests_that_exist():
    page = (ROOT / "docs" / "security.md").read_text()
    rows = [row for row in page.partition("| promise | test |\n|---|---|\n")[2].splitlines() if row.startswith("|")]
    code = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert all(f"def {name}(" in code for name in named), row
