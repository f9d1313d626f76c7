"""Checkpoints, and the slices of their tensors that each rank reads."""

from multicard.weights.checkpoint import Checkpoint, checkpoint_path
from multicard.weights.files import TensorFiles
from multicard.weights.formats import is_gguf, open_files
from multicard.weights.load import LoadReport, SourceOf, agree, check, load
from multicard.weights.source import Converted, Plain, Source, Stacked

__all__ = [
    "Checkpoint",
    "Converted",
    "LoadReport",
    "Plain",
    "Source",
    "SourceOf",
    "Stacked",
    "TensorFiles",
    "agree",
    "check",
    "checkpoint_path",
    "is_gguf",
    "load",
    "open_files",
]
