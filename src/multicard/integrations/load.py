"""``mc.from_pretrained``: the entry to loading by slices."""

from __future__ import annotations

import importlib
import os
from typing import Any

from multicard.extras import need
from multicard.mesh import ParallelMesh
from multicard.weights.folder import folder_path, read_json

PIPELINE, MODEL = "model_index.json", "config.json"
SINGLE = (".safetensors", ".ckpt")


def from_pretrained(path: str | os.PathLike[str], mesh: ParallelMesh, **options: Any) -> Any:
    """A checkpoint as a model or pipeline split over ``mesh``; every rank reads only its own slices.

    Collective: every rank must call it.

    Args:
        path: a folder: a ``transformers`` checkpoint, a ``diffusers`` model, or a whole pipeline.
        mesh: as for :func:`multicard.parallelize`.
        options: dtype: of the weights; None: as the library loads them. plan: as for :func:`multicard.parallelize`.
            For ``transformers`` also model_class (None: what the config names) and values for the config. For a
            pipeline parts (as for :func:`multicard.parallelize`), variant and trust_remote_code, but no plan.

    Raises:
        CheckpointError: files or tensors are missing, damaged or of another shape; the same on every rank.
        ConfigError: a rank's share of a pipeline doesn't fit in memory, or as for :func:`multicard.parallelize`.
        UnsupportedError: a file instead of a folder, or as for :func:`multicard.parallelize`.
    """
    folder = folder_path(path)
    if (folder / PIPELINE).is_file() or (folder.suffix in SINGLE and folder.is_file()):
        need("diffusers", "a diffusers pipeline")
        return _diffusers("pipeline").from_folder(folder, mesh, **options)
    if (folder / MODEL).is_file() and (name := read_json(folder, MODEL).get("_class_name")):
        need("diffusers", "a diffusers model")
        return _diffusers("pipeline").model_from_folder(folder, str(name), mesh, **options)
    return importlib.import_module("multicard.integrations.transformers").from_pretrained(path, mesh, **options)


def _diffusers(name: str) -> Any:
    return importlib.import_module(f"multicard.integrations.diffusers.{name}")
