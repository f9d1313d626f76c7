"""What a downloaded config may not decide: which code runs, what is fetched, and that building its model never ends."""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from multicard.errors import CheckpointError, MulticardError, UnsupportedError
from multicard.weights.folder import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

IMPLEMENTATIONS = {"attn_implementation", "experts_implementation"}
"""Settings that name the code of a kind of layer. transformers takes a name with a slash for a package of the hub."""
SPELLED = re.compile(rf"_?({'|'.join(IMPLEMENTATIONS)})(_internal)?")
COUNTS = re.compile(r".*(layers|blocks|depth|experts)\w*")
MOST_MODULES, LARGEST = 4096, 1 << 40


def read_config(folder: pathlib.Path, name: str = "config.json") -> dict[str, Any]:
    """A config of another library's model, of which nothing has been built yet.

    Raises:
        CheckpointError: it isn't JSON, or says sizes that no model has.
        UnsupportedError: it names code of the hub.
    """
    raw = read_json(folder, name)
    _check(raw, folder / name)
    return raw


def _check(raw: dict[str, Any], where: pathlib.Path) -> None:
    for key, value in raw.items():
        if SPELLED.fullmatch(key) and "/" in str(value):
            raise UnsupportedError(f"{where}: {key}={value!r} is code from the hub, which a checkpoint can't ask for")
        most = MOST_MODULES if COUNTS.fullmatch(key) else LARGEST
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict):
                _check(each, where)
            elif isinstance(each, int) and abs(each) > most:
                raise CheckpointError(f"{where}: {key}={each}: {most} at most")


def choose_implementations(config: PreTrainedConfig, chosen: Mapping[str, Any]) -> None:
    """Take the code of its layers from the caller's choice, or else from transformers' own, never from the file."""
    for name in IMPLEMENTATIONS:
        setattr(config, f"_{name}", chosen.get(name))  # and so those of the configs inside it


@contextlib.contextmanager
def blamed_on(where: str) -> Iterator[None]:
    """Whatever another library raises in here is a CheckpointError that begins with ``where``."""
    try:
        yield
    except MulticardError:
        raise
    except Exception as error:
        said = next(iter(str(error).strip().splitlines()), "")
        raise CheckpointError(f"{where} ({type(error).__name__}: {said})") from error


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Nothing in here is fetched by Hugging Face's libraries, whatever a config asks for."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
