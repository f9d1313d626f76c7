"""Compiled stages on disk: one folder for each kind of decoder, processor and version, which only its owner may write.

A compiled stage is machine code, so a folder that others could have written to isn't used.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import pathlib
import platform
import stat
from collections.abc import Sequence

import torch

from multicard.errors import ConfigError
from multicard.models import stages
from multicard.models.decoder import ParallelTransformer
from multicard.quantized.weight import blocks_of

SOURCES = (
    "models/stages.py",
    "models/decoder.py",
    "models/rope.py",
    "models/compiler.py",
    "attention/one_query.py",
    "attention/segments.py",
    "layers",
    "quantized",
)
"""Files of multicard from which a stage is compiled."""


def cache_folder() -> pathlib.Path:
    """MULTICARD_CACHE, or multicard's folder in XDG_CACHE_HOME or ~/.cache; made where it is missing.

    Raises:
        ConfigError: it can't be made, or another user owns it or could write to it.
    """
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path("~/.cache").expanduser()
    folder = pathlib.Path(os.environ.get("MULTICARD_CACHE") or pathlib.Path(home, "multicard"))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise ConfigError(f"{folder}, for compiled code, can't be made: {error}; set MULTICARD_CACHE") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise ConfigError(
            f"{folder} holds compiled code, and must be a folder that belongs to you and that only you can write: "
            f"`chmod 700 {folder}`, or set MULTICARD_CACHE"
        )
    return folder


def folder_of(model: ParallelTransformer, rows: int) -> pathlib.Path:
    """Where such a model's compiled stages for ``rows`` are, or will be, for this processor and number of threads."""
    found = stages.different(model, rows)
    shapes = [(s.name, [(n, tuple(p.shape), blocks_of(p)) for n, p in s.named_parameters()]) for s in found]
    config = model.config
    fixed = (model.heads, config.head_dim, config.norm_eps, config.hidden, config.qk_norm, model.dtype, rows)
    return cache_folder() / _digest([shapes, fixed, _here(), torch.get_num_threads()])


def missing(folder: pathlib.Path, names: Sequence[str]) -> list[str]:
    return [name for name in names if not path_of(folder, name).exists()]


def path_of(folder: pathlib.Path, name: str) -> pathlib.Path:
    return folder / f"{name}.so"


def lock(folder: pathlib.Path) -> int | None:
    """A descriptor that holds the right to compile into ``folder``; None while another process has it."""
    folder.mkdir(mode=0o700, exist_ok=True)
    held = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        return None
    return held


@functools.cache
def _here() -> str:
    """The processor, torch, and multicard's own sources of the stages."""
    root = pathlib.Path(__file__).parents[1]
    files = [path for name in SOURCES for path in sorted([root / name, *(root / name).glob("*.py")]) if path.is_file()]
    own = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    return _digest([own, torch.__version__, platform.machine(), _processor()])


def _processor() -> list[str]:
    """The processor's name and features: code is compiled for exactly these."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.processor()]
    wanted = ("model name", "flags", "Features", "CPU part")
    return sorted({line for line in lines if line.startswith(wanted)})


def _digest(parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
