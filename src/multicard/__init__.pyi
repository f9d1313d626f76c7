# The public surface. `from .module import Name as Name`, in the order of the house's floors.
from . import errors as errors
from .attention import attend as attend
from .attention import attend_decode as attend_decode
from .attention import attention_forward as attention_forward
from .attention import gather_sequence as gather_sequence
from .attention import shard_sequence as shard_sequence
from .axis import Axis as Axis
from .config import ParallelConfig as ParallelConfig
from .diffusion import DiffusionOutput as DiffusionOutput
from .diffusion import DiffusionPipeline as DiffusionPipeline
from .integrations.load import from_pretrained as from_pretrained
from .integrations.parallelize import parallelize as parallelize
from .launch import Kept as Kept
from .launch import Ranks as Ranks
from .launch import launch as launch
from .layers import ColumnParallelConv2d as ColumnParallelConv2d
from .layers import ColumnParallelConv3d as ColumnParallelConv3d
from .layers import ColumnParallelLinear as ColumnParallelLinear
from .layers import GatherLastDim as GatherLastDim
from .layers import ParallelLMHead as ParallelLMHead
from .layers import RowParallelConv2d as RowParallelConv2d
from .layers import RowParallelConv3d as RowParallelConv3d
from .layers import RowParallelLinear as RowParallelLinear
from .layers import VocabParallelEmbedding as VocabParallelEmbedding
from .llm import LLM as LLM
from .llm import Generation as Generation
from .mesh import ParallelMesh as ParallelMesh
from .mesh import init_mesh as init_mesh
from .mesh import single as single
from .models.decoder import ParallelAttention as ParallelAttention
from .models.decoder import ParallelMLP as ParallelMLP
from .models.decoder import ParallelTransformer as ParallelTransformer
from .models.decoder import ParallelTransformerLayer as ParallelTransformerLayer

__version__: str
