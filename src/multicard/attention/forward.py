"""``attention_forward``: attention on one card, with MindIE-SD's signature."""

from __future__ import annotations

from torch import Tensor

from multicard.attention.checks import check_mask, check_name, check_tensors
from multicard.attention.kernels import block_attention, reference
from multicard.attention.no_backward import inference_only

OPT_MODES = ("runtime", "static", "manual")
OP_TYPES = ("prompt_flash_attn", "fused_attn_score", "ascend_laser_attention")
OPERATOR_LAYOUTS = ("BNSD", "BSND", "BSH")


@inference_only
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    fused: bool = True,
    head_first: bool = False,
    opt_mode: str = "runtime",
    op_type: str = "fused_attn_score",
    layout: str = "BNSD",
) -> Tensor:
    """softmax(q·kᵀ·scale + attn_mask)·v on one card, with the signature of ``mindiesd.attention_forward``.

    In MindIE-SD ``opt_mode``, ``op_type`` and ``layout`` choose an Ascend operator. Here the first kernel that supports
    the call is used, so these three are checked but have no effect.

    Args:
        q: ``(B, Sq, H, D)``; with ``head_first`` ``(B, H, Sq, D)``; k and v likewise, H a multiple of their heads.
        attn_mask: ``(B|1, H|1, Sq|1, Sk)``; bool (True = keep) or added to the scores.
        scale: None means ``1/√D``.
        fused: False computes by the formula, in plain torch.
        layout: the operator's layout, "BNSD", "BSND" or "BSH"; it does not describe q, k, v.

    Returns:
        the shape of q with v's head_dim, in q's dtype. Rows with nothing to attend to give zeros.

    Raises:
        ConfigError: an unknown ``opt_mode``, ``op_type`` or ``layout``, or shapes that don't fit together.
    """
    check_name("opt_mode", opt_mode, OPT_MODES)
    check_name("op_type", op_type, OP_TYPES)
    check_name("layout", layout, OPERATOR_LAYOUTS)
    if head_first:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    check_tensors(q, k, v)
    if attn_mask is not None:
        check_mask("attn_mask", attn_mask, q, k.shape[1], "(batch|1, heads|1, rows|1, keys)")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    kernel = None if fused else reference.KERNEL
    out = block_attention(q, k, v, scale=scale, mask=attn_mask, kernel=kernel)[0].to(q.dtype)
    return out.transpose(1, 2) if head_first else out
