"""Checkpoints, and the slices of their tensors that each rank reads."""

from multicard.weights.checkpoint import Checkpoint
from multicard.weights.load import LoadReport, SourceOf, agree, check, load
from multicard.weights.source import Converted, Plain, Source, Stacked

__all__ = ["Checkpoint", "Converted", "LoadReport", "Plain", "Source", "SourceOf", "Stacked", "agree", "check", "load"]
