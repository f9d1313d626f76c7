"""pyproject.toml, the lock and the page agree with one table of versions; `multicard info` says what isn't in it."""

import importlib.metadata
import itertools
import json
import pathlib
import re
import tomllib

import pytest

from multicard import versions
from multicard.cli import main
from versions_table import shown, table

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKED = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE))


def bounds(*requirements: str) -> dict[str, str]:
    """Lower bounds by name; every requirement has one and nothing else."""
    return dict(requirement.split(">=") for requirement in requirements)


def test_pyproject_promises_what_the_table_says():
    extras = PROJECT["optional-dependencies"]
    promised = {tested.name: tested.promised or tested.lowest for tested in versions.TABLE}
    assert bounds(*PROJECT["dependencies"], *extras["transformers"], *extras["diffusers"], *extras["lora"]) == promised


def test_what_is_locked_was_tested():
    for tested in versions.TABLE:
        within = versions.release(tested.lowest), versions.release(tested.newest)
        assert within[0] <= versions.release(LOCKED[tested.name]) <= within[1], tested.name


def test_the_lock_has_every_direct_dependency_and_the_tools():
    direct = itertools.chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for name, lowest in bounds(*direct).items():
        assert versions.release(LOCKED[name]) >= versions.release(lowest), f"{name}: make lock"
    assert {"pip", "setuptools"} <= set(LOCKED)


def test_the_page_is_up_to_date():
    assert shown() == table(), "run `python tests/versions_table.py`"


@pytest.fixture
def install(monkeypatch):
    """``install(name, version)``: as if that version were installed; None for none."""

    def pretend(name, version):
        def other(asked):
            if asked == name and version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version if asked == name else real(asked)

        real = importlib.metadata.version
        monkeypatch.setattr(importlib.metadata, "version", other)

    return pretend


NEWER, OLDER = "newer than 5.24.0, the newest tested", "older than 5.21.0, the lowest tested"


@pytest.mark.parametrize(
    ("version", "remark"),
    [("5.24.0", None), ("5.21.0", None), ("5.21", None), ("5.22.1", None), (None, None), ("5.24.1", NEWER),
     ("5.25.0.dev0", NEWER), ("6.0", NEWER), ("5.20.1", OLDER), ("4.57.6", OLDER)],
)  # fmt: skip
def test_what_lies_outside_is_said(install, monkeypatch, version, remark):
    monkeypatch.setitem(versions.BY_NAME, "transformers", versions.Tested("transformers", "5.21.0", "5.24.0"))
    install("transformers", version)
    here = f"transformers {version}" if version else "transformers isn't installed"
    assert versions.untested("transformers") == remark
    assert versions.describe("transformers") == f"{here}; tested: 5.21.0 to 5.24.0"


def test_one_version_local_parts_and_names_that_arent_in_the_table(install, monkeypatch):
    monkeypatch.setitem(versions.BY_NAME, "torch", versions.Tested("torch", "2.13.0", "2.13.0"))
    install("torch", "2.13.0+cpu")
    assert versions.untested("torch") is None
    assert versions.describe("torch") == "torch 2.13.0+cpu; tested: 2.13.0"
    assert versions.describe("pytest") == f"pytest {pytest.__version__}"
    assert versions.untested("pytest") is None


def test_info_says_so(install, capsys):
    install("diffusers", "99.0")
    with pytest.raises(SystemExit, match="0"):
        main(["info"])
    newest = versions.BY_NAME["diffusers"].newest
    assert f"99.0, newer than {newest}, the newest tested\n" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["info", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["diffusers"] == "99.0"
    assert found["untested"]["diffusers"] == f"newer than {newest}, the newest tested"
