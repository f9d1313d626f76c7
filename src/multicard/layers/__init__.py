"""Layers split over a mesh axis, exact at any degree; on an axis of size 1 they are plain layers."""

from multicard.layers.conv import ColumnParallelConv2d, ColumnParallelConv3d, RowParallelConv2d, RowParallelConv3d
from multicard.layers.embedding import VocabParallelEmbedding
from multicard.layers.head import GatherLastDim, ParallelLMHead
from multicard.layers.linear import ColumnParallelLinear, RowParallelLinear
from multicard.layers.norm import ParallelRMSNorm, RMSNorm
from multicard.layers.shard import Shard, even_shares, shard_of

__all__ = [
    "ColumnParallelConv2d",
    "ColumnParallelConv3d",
    "ColumnParallelLinear",
    "GatherLastDim",
    "ParallelLMHead",
    "ParallelRMSNorm",
    "RMSNorm",
    "RowParallelConv2d",
    "RowParallelConv3d",
    "RowParallelLinear",
    "Shard",
    "VocabParallelEmbedding",
    "even_shares",
    "shard_of",
]
