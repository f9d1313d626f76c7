"""Attention over a split sequence, as ``transformers``' attention and mask interfaces call it.

Causality, window and padding come from positions in the whole sequence and the 2-D mask, never from ``position_ids``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn

from multicard.attention import choose_schedule
from multicard.attention.kernels import block_attention
from multicard.attention.merge import merge_ranks
from multicard.attention.segments import Segments, by_segment
from multicard.attention.sharding import Sharding
from multicard.attention.ulysses import group_attention
from multicard.attention.visibility import Visibility, as_tensor, both
from multicard.errors import UnsupportedError
from multicard.integrations.transformers.cache import Chunk, Spans
from multicard.mesh import ParallelMesh

NAME = "multicard"
"""``attn_implementation`` of a model with a split sequence."""

KNOWN = {"position_ids", "dropout", "scaling", "sliding_window", "is_causal", "use_cache", "output_attentions"}
"""Arguments that models may pass to attention. Any other that isn't None may change the result, and is refused."""


@dataclasses.dataclass
class Step:
    """The current forward pass, for attention.

    Attributes:
        mesh: its sequence axis splits the pass.
        chunk: the new tokens.
        keys: by rank, the positions of its keys in storage order, including the new ones.
        keep: ``(batch, all positions)`` bool, False for padding; None: no padding.
        attended: the modules that have called attention.
    """

    mesh: ParallelMesh
    chunk: Chunk
    keys: tuple[Spans, ...]
    keep: Tensor | None
    attended: set[nn.Module] = dataclasses.field(default_factory=set)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The interface's function: ``(batch, heads, rows, head_dim)`` in, ``(batch, rows, heads, head_dim)`` out.

    A sliced chunk goes through ring, Ulysses or both; a chunk that every rank has whole costs one all-gather.
    """
    step: Step | None = vars(module)["_multicard_sequence"].step
    if step is None:
        raise UnsupportedError(f"{type(module).__name__} outside its model's forward: call the model, not its layers")
    strange = [name for name, x in kwargs.items() if name not in KNOWN and x is not None and x is not False]
    if strange or attention_mask is not None or dropout:
        raise UnsupportedError(
            f"{type(module).__name__} with {', '.join(strange) or 'a mask or dropout of its own'}: "
            "unsupported with a split sequence; use tp alone"
        )
    step.attended.add(module)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    segments = getattr(module, "_multicard_segments", None) or ((range(q.shape[2]), range(k.shape[2])),)
    if step.chunk.sliced:
        return by_segment(functools.partial(_sliced, step, sliding_window, scale), segments, q, k, v), None
    return _whole(step, q, k, v, segments, scale, sliding_window), None


def _sliced(step: Step, window: int | None, scale: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each rank has its slice of the new rows, and its keys of all positions."""
    mesh, rows = step.mesh, step.chunk.held
    mask = None
    if window is not None and window < step.chunk.stop:
        mine = as_tensor(rows[mesh.sequence.rank])
        mask = (mine[:, None] - torch.arange(step.chunk.stop) < window)[None, None].to(q.device)
    choice = choose_schedule(
        mesh,
        heads=q.shape[2],
        kv_heads=k.shape[2],
        seq_len=step.chunk.length,
        kv_seq_len=step.chunk.stop,
        causal=True,
        order="zigzag",
        masked=mask is not None,
    )
    sharding = Sharding(*choice.axes(mesh), rows, step.keys, mesh.sequence.rank, False)
    visible = Visibility(
        blocks=sharding.blocks, causal=True, q_positions=sharding.positions(0), mask=mask, key_mask=step.keep
    )
    return group_attention(q, k, v, sharding=sharding, visible=visible, scale=scale, joint=None)[0]


def _whole(step: Step, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None) -> Tensor:
    """Every rank has all new rows, and attends to its own keys; the partial outputs are merged in rank order."""
    k, v, mask = _visible(step, k, v, window)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = block_attention(q, k, v, scale=scale, mask=mask)
        return torch.cat([out.float(), lse.unsqueeze(-1)], -1)

    parts = by_segment(attend, segments, q, k, v)
    return merge_ranks(parts[..., :-1], parts[..., -1], step.mesh.sequence).to(q.dtype)


def _visible(step: Step, k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """This rank's keys that any new row may see, and the mask ``(batch|1, 1, rows|1, keys)`` if one is needed."""
    chunk, spans = step.chunk, step.keys[step.mesh.sequence.rank]
    first = 0 if window is None else max(chunk.start - window + 1, 0)
    hidden = sum(len(range(span.start, min(span.stop, first))) for span in spans)
    k, v = k[:, hidden:], v[:, hidden:]
    if chunk.length == 1 and step.keep is None:
        return k, v, None
    positions = as_tensor(spans)[hidden:].to(k.device)
    mask = None
    if chunk.length > 1:
        rows = torch.arange(chunk.start, chunk.stop, device=k.device)[:, None]
        mask = positions <= rows
        if window is not None:
            mask = mask & (rows - positions < window)
        mask = mask[None, None]
    if step.keep is not None:
        mask = both(mask, step.keep[:, None, None].index_select(3, positions))
    return k, v, mask


def mask_forward(*args: Any, use_vmap: bool = False, **kwargs: Any) -> None:
    """The mask interface's function. Gives no mask, as attention makes its own; unknown mask rules are refused."""
    if use_vmap:
        raise UnsupportedError(
            "the model's own mask rule (for example bidirectional blocks) with a split sequence: use tp alone"
        )


def register() -> None:
    """Register both with ``transformers``; a second call does nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, mask_forward)
