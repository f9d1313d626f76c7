"""Layers split over a mesh axis; each is exact at any degree and the plain layer on an axis of size 1."""

from multicard.layers.embedding import VocabParallelEmbedding
from multicard.layers.head import GatherLastDim, ParallelLMHead
from multicard.layers.linear import ColumnParallelLinear, RowParallelLinear
from multicard.layers.norm import ParallelRMSNorm, RMSNorm
from multicard.layers.shard import Shard, even_shares, shard_of

__all__ = [
    "ColumnParallelLinear",
    "GatherLastDim",
    "ParallelLMHead",
    "ParallelRMSNorm",
    "RMSNorm",
    "RowParallelLinear",
    "Shard",
    "VocabParallelEmbedding",
    "even_shares",
    "shard_of",
]
