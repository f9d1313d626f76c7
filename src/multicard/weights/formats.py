"""Which format a checkpoint's weights have, by its path."""

from __future__ import annotations

import os
import pathlib

from multicard.weights.checkpoint import Checkpoint
from multicard.weights.files import TensorFiles
from multicard.weights.gguf.files import GGUFFiles


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` names a GGUF file, by its ending or because it is a file at all, rather than a folder."""
    path = pathlib.Path(path)
    return not path.is_dir() and (path.suffix == ".gguf" or path.is_file())


def open_files(path: str | os.PathLike[str], stem: str = "model") -> TensorFiles:
    """The weights at ``path``: of a GGUF file, or of a folder with safetensors files whose names begin with ``stem``.

    Raises as :class:`GGUFFiles` or :class:`Checkpoint`.
    """
    return GGUFFiles(path) if is_gguf(path) else Checkpoint(path, stem)
