"""The decoder: Llama, Mistral, Qwen2 and Qwen3 as one pre-norm transformer made of parallel layers.

The tensor-parallel axis splits query heads with the key/value heads that they read, the MLP by width, and the
vocabulary by ids: two all-reduces a layer and one for the embedding. No code here depends on the degree; on one rank it
is the plain model. The cache knows where keys and values are, so it also computes attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multicard import partition
from multicard.errors import ConfigError
from multicard.layers.embedding import VocabParallelEmbedding
from multicard.layers.head import ParallelLMHead
from multicard.layers.linear import ColumnParallelLinear, RowParallelLinear
from multicard.layers.norm import RMSNorm
from multicard.layers.shard import Shares
from multicard.mesh import ParallelMesh
from multicard.models.config import DecoderConfig
from multicard.models.kv_cache import KVCache
from multicard.models.packed_prompts import PackedPrompts
from multicard.models.rope import Rope, rotate
from multicard.models.sequence_cache import SequenceKVCache

Where = torch.device | str | None
Cache = KVCache | SequenceKVCache
Kept = Cache | PackedPrompts
"""Where a forward's keys and values go."""


class ParallelAttention(nn.Module):
    """Grouped-query self-attention over a cache, with this rank's heads.

    Query heads are split evenly in order; each rank holds the key/value heads that its query heads read, so the degree
    may be any number up to that of the heads. One all-reduce, after the output projection.

    Raises:
        ConfigError: more ranks than attention heads.
    """

    def __init__(
        self, config: DecoderConfig, mesh: ParallelMesh, dtype: torch.dtype | None = None, device: Where = None
    ) -> None:
        super().__init__()
        heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
        if mesh.tp.size > heads:
            raise ConfigError(
                f"tp={mesh.tp.size} with {heads} attention heads: each rank needs one, so tp is {heads} at most"
            )
        shards = partition.split_heads(heads, kv_heads, mesh.tp.size)
        self.heads = shards[mesh.tp.rank]
        self.head_dim = dim
        self.local = (len(self.heads.query), len(self.heads.kv), len(self.heads.kv))
        parts = (("q_proj", heads * dim), ("k_proj", kv_heads * dim), ("v_proj", kv_heads * dim))
        self.qkv_proj = ColumnParallelLinear(
            config.hidden,
            (heads + 2 * kv_heads) * dim,
            mesh.tp,
            config.qkv_bias,
            dtype=dtype,
            device=device,
            shares=_qkv_shares(shards, heads, kv_heads, dim),
            parts=parts,
        )
        self.o_proj = RowParallelLinear(
            heads * dim,
            config.hidden,
            mesh.tp,
            config.output_bias,
            dtype=dtype,
            device=device,
            shares=[(_rows(shard.query, dim),) for shard in shards],
        )
        self.q_norm = RMSNorm(dim, config.norm_eps, dtype, device) if config.qk_norm else None
        self.k_norm = RMSNorm(dim, config.norm_eps, dtype, device) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Kept, layer: int) -> Tensor:
        """``(batch, tokens, hidden)``, the same on every rank, to the same."""
        batch, tokens, _ = x.shape
        return self.o_proj(cache.attend(layer, *self.project(x, cos, sin)).reshape(batch, tokens, -1))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``(batch, tokens, this rank's heads, head_dim)``, rotated. No collective."""
        batch, tokens, _ = x.shape
        q_heads, k_heads, _ = self.local
        qkv = self.qkv_proj(x).view(batch, tokens, -1, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split(self.local, dim=2)
            return rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin), v
        both, v = qkv.split((q_heads + k_heads, k_heads), dim=2)
        q, k = rotate(both, cos, sin).split((q_heads, k_heads), dim=2)
        return q, k, v


class ParallelMLP(nn.Module):
    """``down(silu(gate(x)) · up(x))`` with this rank's part of the intermediate size. One all-reduce.

    Args:
        block: features that stay together on a rank where every rank gets some.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        mesh: ParallelMesh,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: Where = None,
        block: int = 1,
    ) -> None:
        super().__init__()
        rows = partition.split_blocks(intermediate, mesh.tp.size, block)
        shares = [(span, range(intermediate + span.start, intermediate + span.stop)) for span in rows]
        parts = (("gate_proj", intermediate), ("up_proj", intermediate))
        self.gate_up_proj = ColumnParallelLinear(
            hidden, 2 * intermediate, mesh.tp, bias, dtype=dtype, device=device, shares=shares, parts=parts
        )
        self.down_proj = RowParallelLinear(
            intermediate, hidden, mesh.tp, bias, dtype=dtype, device=device, shares=[(span,) for span in rows]
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(..., hidden)``, the same on every rank, to the same."""
        return self.down_proj(self.widen(x))

    def widen(self, x: Tensor) -> Tensor:
        """``(..., hidden)`` to ``(..., this rank's intermediate size)``. No collective."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


class ParallelTransformerLayer(nn.Module):
    """Attention and MLP, each after a norm and with a residual connection. Two all-reduces."""

    def __init__(
        self, config: DecoderConfig, mesh: ParallelMesh, dtype: torch.dtype | None = None, device: Where = None
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, config.norm_eps, dtype, device)
        self.self_attn = ParallelAttention(config, mesh, dtype, device)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.norm_eps, dtype, device)
        self.mlp = ParallelMLP(config.hidden, config.intermediate, mesh, config.mlp_bias, dtype, device, config.block)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Kept, layer: int) -> Tensor:
        """``(batch, tokens, hidden)``, the same on every rank, to the same."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class ParallelTransformer(nn.Module):
    """The whole decoder: token ids to this rank's slice of the logits.

    Parameters carry the names that Hugging Face checkpoints give them, and their own shard rules.

    Args:
        config: what to build.
        mesh: ``mesh.tp`` splits it.
        dtype: None: the checkpoint's.
        device: None: the mesh's. "meta" allocates nothing, for :func:`multicard.weights.load`.
    """

    def __init__(
        self, config: DecoderConfig, mesh: ParallelMesh, dtype: torch.dtype | None = None, device: Where = None
    ) -> None:
        super().__init__()
        self.config, self.mesh = config, mesh
        self.dtype = dtype or config.dtype
        device = device or mesh.device
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden, mesh.tp, self.dtype, device, checks=False
        )
        layers = [ParallelTransformerLayer(config, mesh, self.dtype, device) for _ in range(config.layers)]
        self.layers = nn.ModuleList(layers)
        self.heads = partition.split_heads(config.heads, config.kv_heads, mesh.tp.size)[mesh.tp.rank]
        self.norm = RMSNorm(config.hidden, config.norm_eps, self.dtype, device)
        tied = self.embed_tokens.weight if config.tied_head else None
        self.lm_head = ParallelLMHead(
            config.hidden, config.vocab_size, mesh.tp, dtype=self.dtype, device=device, weight=tied
        )
        self.rope = Rope(config.rope, config.head_dim, self.dtype, mesh.device)

    def new_cache(self, capacity: int, starts: tuple[int, ...] = (0,)) -> Cache:
        """An empty cache for this rank's heads, sharded over the sequence axis if there is one.

        See :class:`~multicard.models.kv_cache.KVCache`.
        """
        sizes = (self.config.layers, self.heads, self.config.head_dim, capacity, starts, self.dtype)
        if self.mesh.sequence.size > 1:
            return SequenceKVCache(self.mesh, *sizes)
        return KVCache(*sizes, self.mesh.device)

    def forward(self, ids: Tensor, cache: Kept, last_only: bool = True) -> Tensor:
        """Run the next tokens through the model.

        Args:
            ids: ``(batch, tokens)``, the same on every rank, each in the vocabulary: a request is checked before.
            cache: the earlier tokens; these are added to it.
            last_only: logits of the last token only.

        Returns:
            ``(batch, 1 or tokens, this rank's vocabulary)``.
        """
        ids, positions = cache.advance(ids)
        cos, sin = self.rope(positions, cache.length)
        x = self.embed_tokens(ids)
        for number, layer in enumerate(self.layers):
            x = layer(x, cos, sin, cache, number)
        return self.lm_head(self.norm(cache.last(x) if last_only else cache.whole(x)))


def _rows(heads: range, dim: int) -> range:
    return range(heads.start * dim, heads.stop * dim)


def _qkv_shares(shards: tuple[partition.HeadShard, ...], heads: int, kv_heads: int, dim: int) -> Shares:
    """Every rank's spans of the fused projection: those of its query heads, key heads and value heads."""

    def rows(first: int, some: range) -> range:
        return _rows(range(first + some.start, first + some.stop), dim)

    return tuple((rows(0, s.query), rows(heads, s.kv), rows(heads + kv_heads, s.kv)) for s in shards)
