"""Transformer inference on several cards at once."""

from multicard import errors
from multicard.config import ParallelConfig
from multicard.mesh import Axis, ParallelMesh, init_mesh, single

__version__ = "0.1.0"
__all__ = ["Axis", "ParallelConfig", "ParallelMesh", "errors", "init_mesh", "single"]
