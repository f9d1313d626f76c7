"""attention_forward: MindIE-SD's call on one card."""

import pytest
import torch
from test_kernels import exact, make_mask, tensors

import multicard as mc


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("head_first", [True, False])
@pytest.mark.parametrize("mask", [None, "bool 2 1 5", "float 1 4 1"])
def test_layouts_and_masks(fused, head_first, mask):
    q, k, v = tensors(value_dim=24)
    given = make_mask(mask, 7, 5)
    wanted = exact(q, k, v, given)[0]
    if head_first:
        q, k, v, wanted = (x.transpose(1, 2) for x in (q, k, v, wanted))
    out = mc.attention_forward(q, k, v, attn_mask=given, scale=0.25, fused=fused, head_first=head_first)
    torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=1e-5)


def test_the_default_scale_and_dtype():
    q, k, v = tensors(dtype=torch.bfloat16)
    out = mc.attention_forward(q, k, v)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact(q, k, v, scale=16**-0.5)[0], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("opt_mode", ["runtime", "static", "manual"])
@pytest.mark.parametrize("op_type", ["prompt_flash_attn", "fused_attn_score", "ascend_laser_attention"])
@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH"])
def test_what_chooses_ascends_operators_changes_nothing_here(opt_mode, op_type, layout):
    q, k, v = tensors()
    out = mc.attention_forward(q, k, v, opt_mode=opt_mode, op_type=op_type, layout=layout)
    assert torch.equal(out, mc.attention_forward(q, k, v))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"opt_mode": "fast"}, "opt_mode='fast': must be one of runtime, static, manual"),
        ({"op_type": "flash"}, "op_type='flash': must be one of prompt_flash_attn"),
        ({"layout": "SBH"}, "layout='SBH': must be one of BNSD"),
        ({"attn_mask": torch.ones(5, 7)}, r"attn_mask has shape \(5, 7\)"),
    ],
)
def test_unknown_values_are_refused(arguments, words):
    with pytest.raises(mc.errors.ConfigError, match=words):
        mc.attention_forward(*tensors(), **arguments)
