# The public surface. `from .module import Name as Name`, in the order of the house's floors.
from . import errors as errors
from .config import ParallelConfig as ParallelConfig
from .mesh import Axis as Axis
from .mesh import ParallelMesh as ParallelMesh
from .mesh import init_mesh as init_mesh
from .mesh import single as single

__version__: str
