"""A checkpoint's folder, its JSON files, and the requested dtype of its weights."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import torch

from multicard.errors import CheckpointError, ConfigError

FLOAT_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LONGEST_TEXT = 100_000_000  # bytes: an index of a million tensors has as many


def folder_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """A checkpoint's folder as an absolute path: ranks may have another working folder."""
    return pathlib.Path(path).expanduser().absolute()


def paths_of(name: str, value: Any) -> tuple[pathlib.Path, ...]:
    """One path, or several, as absolute ones. Raises ConfigError, with the argument's ``name``, for anything else."""
    paths = [value] if isinstance(value, str | os.PathLike) or not hasattr(value, "__iter__") else list(value)
    if not all(isinstance(path, str | os.PathLike) for path in paths):
        raise ConfigError(f"{name}={value!r}: must be a path, or a list of paths")
    return tuple(map(folder_path, paths))


def read_text(path: pathlib.Path) -> str:
    """A checkpoint's text file. Raises CheckpointError where it can't be read, is too long, or isn't UTF-8."""
    try:
        if (size := path.stat().st_size) > LONGEST_TEXT:
            raise CheckpointError(f"{path}: {size} bytes; {LONGEST_TEXT} at most")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


def read_json(folder: pathlib.Path, name: str, optional: bool = False) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint folder; with ``optional``, an empty one if the file is missing."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    path = folder / name
    if not path.is_file():
        if optional:
            return {}
        raise CheckpointError(f"{path}: no such file; is {folder} a Hugging Face checkpoint?")
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__} where an object is expected")
    return content


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of that name; None for "auto" or None (the checkpoint's). Raises ConfigError for any other value."""
    if dtype in (None, "auto"):
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in FLOAT_TYPES:
        raise ConfigError(f"dtype={name!r}: must be auto, {', '.join(FLOAT_TYPES)}")
    return FLOAT_TYPES[name]
