"""The checks of ``attend``'s arguments, before any computation or communication."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from multicard import partition
from multicard.errors import ConfigError, UnsupportedError
from multicard.mesh import ParallelMesh


def check_name(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r}: must be one of {', '.join(known)}")


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Shapes ``(B, S, H, D)``, one dtype, one device, heads that are a multiple of the key/value heads."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ConfigError(f"{name} has shape {tuple(x.shape)}: must be (batch, rows, heads, head_dim) in BSND")
        if x.dtype != q.dtype or x.device != q.device:
            raise ConfigError(f"{name} is {x.dtype} on {x.device} and q {q.dtype} on {q.device}: must be the same")
    if not q.is_floating_point():
        raise ConfigError(f"q, k and v are {q.dtype}: must be a floating dtype")
    if k.shape[0] != q.shape[0] or v.shape[:3] != k.shape[:3] or k.shape[3] != q.shape[3]:
        raise ConfigError(
            f"q, k, v of shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} don't fit: one batch, "
            "k and v with the same rows and heads, q and k with the same head_dim"
        )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise UnsupportedError(
            "q, k or v requires gradients: attention here is for inference; call it in torch.no_grad()"
        )
    if k.shape[2] == 0 or q.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ConfigError(f"{q.shape[2]} query heads over {k.shape[2]} key/value heads: must be a multiple")


def whole_lengths(
    q: Tensor,
    k: Tensor,
    mesh: ParallelMesh,
    seq_len: int | None,
    kv_seq_len: int | None,
    order: str,
    replicated_kv: bool,
) -> tuple[int, int]:
    """``seq_len`` and ``kv_seq_len``, computed if not given, and checked against this rank's rows and keys."""
    ranks = mesh.sequence.size
    if replicated_kv:
        kv_seq_len = k.shape[1] if kv_seq_len is None else kv_seq_len
        if kv_seq_len != k.shape[1]:
            raise ConfigError(f"replicated_kv with kv_seq_len={kv_seq_len}, but k has {k.shape[1]} keys: give all keys")
    elif kv_seq_len is None:
        kv_seq_len = k.shape[1] * ranks if seq_len is None else seq_len
    seq_len = q.shape[1] * ranks if seq_len is None else seq_len
    _check_share("seq_len", seq_len, q.shape[1], mesh, order)
    if not replicated_kv:
        _check_share("kv_seq_len", kv_seq_len, k.shape[1], mesh, order)
    return seq_len, kv_seq_len


def _check_share(name: str, length: int, held: int, mesh: ParallelMesh, order: str) -> None:
    expected = partition.sequence_sizes(length, mesh.sequence.size, order)[mesh.sequence.rank]
    if held != expected:
        raise ConfigError(
            f"{name}={length} in {order} order gives sequence rank {mesh.sequence.rank} of {mesh.sequence.size} "
            f"{expected} positions, and it holds {held}: shard with mc.shard_sequence, or give the actual {name}"
        )


def check_masks(
    q: Tensor,
    k: Tensor,
    kv_seq_len: int,
    mask: Tensor | None,
    key_mask: Tensor | None,
    q_positions: Tensor | None,
    kv_positions: Tensor | None,
) -> None:
    if mask is not None:
        check_mask("mask", mask, q, kv_seq_len, "(batch|1, heads|1, local rows, all keys)", shared_rows=False)
    if key_mask is not None:
        check_key_mask("key_mask", key_mask, k)
    for name, positions, rows in (("q_positions", q_positions, q.shape[1]), ("kv_positions", kv_positions, k.shape[1])):
        if positions is None:
            continue
        if positions.shape != (rows,) or positions.is_floating_point() or positions.dtype == torch.bool:
            raise ConfigError(
                f"{name} has shape {tuple(positions.shape)} and dtype {positions.dtype}: must be integers ({rows},), "
                "one for each local position"
            )


def check_joint(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    joint: tuple[Tensor, Tensor, Tensor] | None,
    joint_key_mask: Tensor | None,
    causal: bool,
) -> None:
    if joint is None:
        if joint_key_mask is not None:
            raise ConfigError("joint_key_mask without joint: it masks joint keys; key_mask masks those of the sequence")
        return
    if causal:
        raise UnsupportedError(
            "causal with joint tokens: they have no place in the order; put them into the sequence, or drop causal"
        )
    check_tensors(*joint)
    for name, x, own in zip(("q", "k", "v"), joint, (q, k, v), strict=True):
        if x.shape[0] != own.shape[0] or x.shape[2:] != own.shape[2:] or x.dtype != own.dtype:
            raise ConfigError(
                f"joint {name} of shape {tuple(x.shape)}, {x.dtype} beside {name} of shape {tuple(own.shape)}, "
                f"{own.dtype}: only the rows may differ"
            )
    if joint_key_mask is not None:
        check_key_mask("joint_key_mask", joint_key_mask, joint[1])


def check_mask(name: str, mask: Tensor, q: Tensor, keys: int, words: str, shared_rows: bool = True) -> None:
    """Check a mask: ``(B|1, H|1, rows, keys)``, with ``shared_rows`` also one row for all; bool or floating."""
    batch, rows, heads, _ = q.shape
    wanted = ((1, batch), (1, heads), (1, rows) if shared_rows else (rows,), (keys,))
    if mask.ndim != 4 or any(n not in allowed for n, allowed in zip(mask.shape, wanted, strict=True)):
        here = f"({batch}|1, {heads}|1, {rows}{'|1' if shared_rows else ''}, {keys})"
        raise ConfigError(f"{name} has shape {tuple(mask.shape)}: must be {words}, here {here}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ConfigError(f"{name} is {mask.dtype}: must be bool (True = keep) or floating (added to the scores)")


def check_key_mask(name: str, key_mask: Tensor, k: Tensor) -> None:
    if key_mask.dtype != torch.bool or key_mask.shape != k.shape[:2]:
        raise ConfigError(
            f"{name} has shape {tuple(key_mask.shape)} and dtype {key_mask.dtype}: must be bool {tuple(k.shape[:2])}, "
            "True = may be attended to"
        )
