"""Attention of a diffusers transformer whose sequence is split.

Every attention in diffusers, whether it uses the library's dispatcher or a processor of its own, ends in torch's
``scaled_dot_product_attention``; inside the modules that a sequence plan names, that one call is answered by
:func:`multicard.attend`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from multicard.attention.attend import attend
from multicard.errors import UnsupportedError
from multicard.integrations.diffusers.families import SequencePlan
from multicard.mesh import ParallelMesh
from multicard.partition import split


class SplitAttention(TorchFunctionMode):
    """Answers the first ``scaled_dot_product_attention``; later ones (adapters) attend to whole keys of their own.

    Raises UnsupportedError where a later one is over the sequence again (perturbed attention guidance).

    Args:
        name: of the model, for messages.
        length: image tokens in all.
        outer: what the plan's ``outer_mask`` stands for in this forward.
    """

    def __init__(self, name: str, plan: SequencePlan, mesh: ParallelMesh, length: int, outer: Tensor | None) -> None:
        super().__init__()
        self._name, self._plan, self._mesh, self._length, self._outer = name, plan, mesh, length, outer
        self._mine = split(length, mesh.sequence.size)[mesh.sequence.rank]
        self.attended = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            if not self.attended:
                self.attended = True
                return self._attend(*args, **(kwargs or {}))
            self._check_adapter(*args, **(kwargs or {}))
        if func is Tensor.unflatten:
            func = torch.unflatten  # Dynamo can't trace the method, which is Python's own, under a mode
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """``scaled_dot_product_attention`` on this rank's rows: (B, H, joint + local, D) to the same."""
        local, front = len(self._mine), self._plan.joint == "front"
        tokens = query.shape[2] - local
        if tokens < 0 or key.shape[2] != query.shape[2] or (is_causal and tokens):
            raise UnsupportedError(
                f"{self._name}: attention from {query.shape[2]} to {key.shape[2]} tokens where {local} of "
                f"{self._length} image tokens are here: its sequence plan doesn't cover this"
            )
        outer = None if self._outer is None else self._outer_rows(self._outer, tokens)
        alive = outer if outer is not None and outer.dtype == torch.bool else None
        if alive is not None:
            attn_mask = alive[:, None, None, :]
        elif outer is not None:
            scale = query.shape[3] ** -0.5 if scale is None else scale
            query, key = _biased(query, key, outer, scale)
        joint, image = (slice(tokens), slice(tokens, None)) if front else (slice(local, None), slice(local))
        keep = None if attn_mask is None else self._over_keys(attn_mask, key.shape[2]).expand(query.shape[0], -1)
        out = attend(
            query[:, :, image],
            key[:, :, image],
            value[:, :, image],
            mesh=self._mesh,
            causal=is_causal,
            key_mask=None if keep is None else keep[:, image],
            scale=scale,
            layout="BNSD",
            seq_len=self._length,
            joint=(query[:, :, joint], key[:, :, joint], value[:, :, joint]) if tokens else None,
            joint_position=self._plan.joint,
            joint_key_mask=keep[:, joint] if keep is not None and tokens else None,
        )
        if not isinstance(out, Tensor):
            out = torch.cat([out[1], out[0]] if front else [out[0], out[1]], 2)
        # rows that are dropped attend to nothing, which gives zeros
        return out if alive is None else out.masked_fill(~alive[:, None, :, None], 0)

    def _outer_rows(self, mask: Tensor, tokens: int) -> Tensor:
        """``mask`` of the joint tokens and of this rank's image tokens, in their order."""
        fits = mask.dim() == 2 and mask.shape[1] == tokens + self._length
        if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
            raise UnsupportedError(
                f"{self._name}: {self._plan.outer_mask} {tuple(mask.shape)} of {mask.dtype} isn't one number for each "
                f"of {tokens} + {self._length} tokens; use cfg, tp or dp"
            )
        sizes = (tokens, self._length) if self._plan.joint == "front" else (self._length, tokens)
        mine = slice(self._mine.start, self._mine.stop)
        first, second = mask.split(sizes, 1)
        return torch.cat([first, second[:, mine]] if self._plan.joint == "front" else [first[:, mine], second], 1)

    def _over_keys(self, mask: Tensor, keys: int) -> Tensor:
        """``(B|1, keys)`` bool, out of a mask that is one over keys alone."""
        same_rows = (
            mask.dim() == 4 and mask.shape[3] == keys and all(mask.shape[d] == 1 or mask.stride(d) == 0 for d in (1, 2))
        )
        if not same_rows or mask.dtype != torch.bool:
            raise UnsupportedError(
                f"{self._name}: an attention mask {tuple(mask.shape)} of {mask.dtype} isn't one over keys alone; "
                "use cfg, tp or dp"
            )
        return mask[:, 0, 0]

    def _check_adapter(self, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> None:
        if key.shape[2] == query.shape[2]:
            raise UnsupportedError(
                f"{self._name}: an attention module attends to the sequence twice (perturbed attention guidance?); "
                "its sequence plan doesn't cover this; use cfg, tp or dp"
            )


def _biased(query: Tensor, key: Tensor, rows: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One feature more, by which ``query·key·scale`` grows by the outer product of ``rows`` ``(B, S)`` with itself."""
    more = rows[:, None, :, None].to(query.dtype).expand(query.shape[0], query.shape[1], -1, 1)
    return torch.cat([query, more / scale], 3), torch.cat([key, more], 3)
