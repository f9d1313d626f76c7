"""Checkpoints, and the slices of them that each rank reads."""

from multicard.weights.checkpoint import Checkpoint, verify
from multicard.weights.load import LoadReport, agree, check, load

__all__ = ["Checkpoint", "LoadReport", "agree", "check", "load", "verify"]
