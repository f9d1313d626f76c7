"""Configs in both spellings, and what is refused by name."""

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from multicard.errors import CheckpointError, ConfigError, UnsupportedError
from multicard.models.config import DecoderConfig
from multicard.models.generate import Request
from multicard.models.rope import frequencies

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def test_old_and_new_spelling_are_the_same():
    old = DecoderConfig.from_dict(
        {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "bfloat16"}
    )
    new = DecoderConfig.from_dict(
        {
            **LLAMA,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
            "dtype": "bfloat16",
            "rope_scaling": None,
        }
    )
    assert old == new
    assert (old.rope.theta, old.rope.factor, old.dtype) == (5e5, 2.0, torch.bfloat16)


@pytest.mark.parametrize(
    "spelled",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=lambda s: s["rope_type"],
)
def test_frequencies_are_those_of_transformers(spelled):
    ours = DecoderConfig.from_dict({**LLAMA, "rope_parameters": spelled, "head_dim": 64})
    theirs = transformers.LlamaConfig(
        **{k: v for k, v in LLAMA.items() if k != "model_type"}, head_dim=64, rope_parameters=spelled
    )
    if spelled["rope_type"] == "default":
        expected = 1.0 / 1e6 ** (torch.arange(0, 64, 2).float() / 64)
    else:
        expected, scale = ROPE_INIT_FUNCTIONS[spelled["rope_type"]](theirs, "cpu")
        assert scale == 1.0
    torch.testing.assert_close(frequencies(ours.rope, 64), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gemma2"}, "gemma2"),
        ({"model_type": None}, "model_type None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quant_method 'hqq'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
    ],
    ids=str,
)
def test_what_we_lack_is_refused_by_name(change, named):
    with pytest.raises(UnsupportedError, match=named):
        DecoderConfig.from_dict({**LLAMA, **change})


def test_values_that_cannot_be_meant():
    with pytest.raises(ConfigError, match="multiple"):
        DecoderConfig.from_dict({**LLAMA, "num_key_value_heads": 3})
    with pytest.raises(ConfigError, match="vocab_size=0"):
        DecoderConfig.from_dict({**LLAMA, "vocab_size": 0})
    with pytest.raises(ConfigError, match="even"):
        DecoderConfig.from_dict({**LLAMA, "head_dim": 7})


def test_a_config_that_lacks_a_key(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"config\.json has no 'num_attention_heads'"):
        DecoderConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 16}, 16),
        ({"model_type": "mistral", "sliding_window": None, "layer_types": ["full_attention"]}, None),
        ({"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 4}, None),
        ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": False}, None),
        ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True}, 16),
        ({}, None),
    ],
    ids=str,
)
def test_windows(change, window):
    config = DecoderConfig.from_dict({**LLAMA, "num_key_value_heads": 4, **change})
    assert config.window == window
    Request([[1] * 10], 6).check(config)
    if window is not None:
        with pytest.raises(UnsupportedError, match="sliding window of 16"):
            Request([[1] * 10], 7).check(config)


@pytest.mark.parametrize(
    ("prompt", "new", "said"),
    [
        ([1] * 65, 1, "65 tokens, and the model's context 64"),
        ([], 1, "empty"),
        ([100], 1, "ids are 0 to 99"),
        ([-1], 1, "token id -1"),
        ([1], 0, "max_new_tokens=0"),
    ],
)
def test_requests_that_cannot_be_run(prompt, new, said):
    with pytest.raises(ConfigError, match=said):
        Request([prompt], new).check(DecoderConfig.from_dict(LLAMA))
