"""What a quantization_config says of each module."""

import pytest

from multicard.errors import CheckpointError, UnsupportedError
from multicard.weights.schemes.awq import Awq
from multicard.weights.schemes.compressed import Compressed
from multicard.weights.schemes.config import scheme_of
from multicard.weights.schemes.fp8 import SquareFp8
from multicard.weights.schemes.gptq import Gptq
from multicard.weights.schemes.scheme import checked

Q, V, UP, HEAD = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.self_attn.v_proj",
    "model.layers.1.mlp.up_proj",
    "lm_head",
)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
EIGHT = {"num_bits": 8, "strategy": "channel"}


def groups(*pairs, **more):
    found = {str(n): {"targets": targets, "weights": weights} for n, (targets, weights) in enumerate(pairs)}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": found, **more}


FOUR, EIGHT_BITS = Gptq(4, 128, 1), Gptq(8, -1, 1)
INT4, INT8 = Compressed("U4", 128, False), Compressed("S8", -1, False)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (GPTQ, (FOUR, FOUR, FOUR, None)),
        ({**GPTQ, "lm_head": True}, (FOUR, FOUR, FOUR, FOUR)),
        ({**GPTQ, "checkpoint_format": "gptq_v2"}, (Gptq(4, 128, 0),) * 3 + (None,)),
        (
            {**GPTQ, "dynamic": {"-:.*\\.0\\.": {}, r"+:.*\.1\..*": {"bits": 8, "group_size": -1}}},
            (None, FOUR, EIGHT_BITS, None),
        ),
        ({**GPTQ, "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]]}, (FOUR, None, FOUR, None)),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, (Awq(64),) * 3 + (None,)),
        (
            {
                "quant_method": "awq",
                "w_bit": 4,
                "q_group_size": 64,
                "modules_to_not_convert": ["model.layers.1", "v_proj"],
            },
            (Awq(64), None, None, None),  # layers.1 isn't layers.11
        ),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, (SquareFp8(128, 128),) * 3 + (None,)),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 64], "modules_to_not_convert": ["mlp.up_proj"]},
            (SquareFp8(128, 64), SquareFp8(128, 64), None, SquareFp8(128, 64)),
        ),
        (groups((["Linear"], WEIGHTS), ignore=["lm_head"]), (INT4, INT4, INT4, None)),
        (groups((["Linear"], WEIGHTS), ignore=["re:.*self_attn.*"]), (None, None, INT4, INT4)),
        (groups((["Linear"], WEIGHTS), (["re:.*v_proj", HEAD], EIGHT)), (INT4, INT8, INT4, INT8)),
        (groups((["re:.*self_attn.*"], EIGHT), ([Q], WEIGHTS)), (INT4, INT8, None, None)),
    ],
    ids=str,
)
def test_methods_of_modules(raw, expected):
    scheme = scheme_of(raw)
    assert tuple(scheme.method_of(module) for module in (Q, V, UP, HEAD)) == expected


def test_the_largest_group_stays_together():
    assert scheme_of({**GPTQ, "dynamic": {"+:.*up_proj": {"group_size": 512}}}).block == 512
    assert scheme_of({**GPTQ, "group_size": -1}).block == 1


@pytest.mark.parametrize(
    "raw", [3, [], "gptq", {**GPTQ, "dynamic": {"a": 3}}, {**GPTQ, "modules_in_block_to_quantize": [[3]]}], ids=str
)
def test_values_of_another_kind(raw):
    with pytest.raises(CheckpointError):
        scheme_of(raw)


@pytest.mark.parametrize(
    "pattern", ["(a*)*b", "(.+)+", "(?:a|aa){9}", "x" * 301, ".*" * 5, "[", "(" * 99 + ")" * 99 + "*"]
)
def test_patterns_that_could_take_long(pattern):
    with pytest.raises(UnsupportedError, match="pattern"):
        checked(pattern)
