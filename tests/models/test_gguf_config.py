"""Configs from GGUF files are those of the models they stand for; what isn't implemented is refused by name."""

import numpy as np
import pytest
import torch

import tiny_ggufs as tiny
from multicard.config import ParallelConfig
from multicard.errors import CheckpointError, ConfigError, UnsupportedError
from multicard.models.config import DecoderConfig
from multicard.models.load import check_folder, describe
from multicard.models.rope import frequencies
from multicard.models.tokenizer import Tokenizer


@pytest.mark.parametrize("family", tiny.MODELS)
def test_the_config_is_that_of_the_folder(tmp_path, family):
    model = tiny.write(tmp_path / "m.gguf", family)
    model.save_pretrained(tmp_path)
    found, expected = describe(tmp_path / "m.gguf"), DecoderConfig.from_folder(tmp_path)
    assert found.dtype == torch.bfloat16
    assert found.eos == (2, 0)
    assert found.block == {"llama": 256, "qwen2": 64, "qwen3": 64}[family]  # two blocks of half words stay together
    same = {"dtype": None, "eos": None, "rope": None, "block": None}
    assert {**vars(found), **same} == {**vars(expected), **same}
    torch.testing.assert_close(
        frequencies(found.rope, found.head_dim), frequencies(expected.rope, found.head_dim), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(("types", "dtype"), [(["F32"], torch.float32), (["F16"], torch.bfloat16)])
def test_auto_is_float32_only_where_everything_is(tmp_path, types, dtype):
    tiny.write(tmp_path / "m.gguf", types=types)
    assert describe(tmp_path / "m.gguf").dtype == dtype


KINDS = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}


def sets(key, value):
    """Another value for a key, whether or not it is there; None: no such key."""

    def change(writer, tensors):
        if value is None:
            del writer.kv_data[0][key]
        else:
            getattr(writer, f"add_{KINDS[type(value)]}")(key, value)

    return change


def renames(old, new):
    return lambda writer, tensors: tensors.update({new: tensors.pop(old)})


def vector(name, length):
    return lambda writer, tensors: tensors.update({name: ("F32", np.ones(length, dtype=np.float32))})


def lists(key, change):
    """A list of the tokenizer's, changed in place."""
    return lambda writer, tensors: change(writer.kv_data[0][f"tokenizer.ggml.{key}"].value)


REFUSED = {
    "architecture": (sets("general.architecture", "mistral3"), "'mistral3' isn't one of LLM's for GGUF (llama, qwen2"),
    "no whole model": (sets("general.type", "adapter"), "general.type 'adapter'"),
    "yarn": (sets("llama.rope.scaling.type", "yarn"), "rope.scaling.type 'yarn': the decoder has none and linear"),
    "experts": (sets("llama.expert_count", 8), "'llama.expert_count' is 8"),
    "partial rotation": (
        sets("llama.rope.dimension_count", 16),
        "'llama.rope.dimension_count' is 16: the decoder has 32",
    ),
    "other values": (sets("llama.attention.value_length", 64), "'llama.attention.value_length' is 64"),
    "unknown key": (sets("llama.logit_scale", 2.0), "'llama.logit_scale' is 2.0: the decoder doesn't implement"),
    "vocabulary": (sets("llama.vocab_size", 299), "'llama.vocab_size' is 299: the decoder has 300"),
    "tokenizer": (sets("tokenizer.ggml.model", "t5"), "a tokenizer of the kind 't5'; readable are gpt2, llama"),
    "tokenizer's setting": (sets("tokenizer.ggml.add_sep_token", True), "add_sep_token' is a setting"),
    "rule for text": (sets("tokenizer.ggml.pre", "gpt-4o"), "tokenizer.ggml.pre 'gpt-4o': the rule for cutting text"),
    "no rule for text": (sets("tokenizer.ggml.pre", None), "tokenizer.ggml.pre None"),
    "space in front": (sets("tokenizer.ggml.add_space_prefix", True), "add_space_prefix with a tokenizer of"),
}
DAMAGED = {
    "no architecture": (sets("general.architecture", None), "has no 'general.architecture'"),
    "no key": (sets("llama.embedding_length", None), "has no 'embedding_length'"),
    "layers": (sets("llama.block_count", 0), "layers=0: a whole number"),
    "text for a number": (sets("llama.attention.head_count", "8"), "is damaged (TypeError"),
    "one for each layer": (sets("llama.feed_forward_length", [512, 512]), "intermediate=[512, 512]: a whole number"),
    "no heads": (sets("llama.attention.head_count", 0), "is damaged (ZeroDivisionError"),
    "width": (sets("llama.feed_forward_length", 480), "ffn_gate.weight has shape (512, 256) where the config asks for"),
    "too few layers": (sets("llama.block_count", 1), "the model of this config has no tensor 'blk.1.attn_q.weight'"),
    "too many layers": (sets("llama.block_count", 3), "no tensor 'blk.2."),
    "missing tensor": (renames("output_norm.weight", "x"), "no tensor 'output_norm.weight', which the config asks for"),
    "no embedding": (renames("token_embd.weight", "x"), "no tensor 'token_embd.weight'"),
    "unknown tensor": (vector("blk.0.attn_q_norm.weight", 32), "this config has no tensor 'blk.0.attn_q_norm.weight'"),
    "one bias": (vector("blk.0.attn_q.bias", 256), "no tensor 'blk.0.attn_k.bias', which the config asks for"),
    "factors": (vector("rope_freqs.weight", 15), "rope_freqs.weight has shape (15,) where heads of 32 ask for (16,)"),
    "factor 0": (
        lambda writer, tensors: tensors["rope_freqs.weight"][1].fill(0),
        "rope divisors: finite numbers above 0",
    ),
    "fewer tokens": (lists("tokens", lambda tokens: tokens.pop()), "token_type has 300 values for 299 tokens"),
    "fewer rows": (
        lambda writer, tensors: [
            writer.kv_data[0][f"tokenizer.ggml.{key}"].value.pop() for key in ("tokens", "token_type")
        ],
        "299 tokens, and token_embd.weight has 300 rows",
    ),
    "token twice": (lists("tokens", lambda tokens: tokens.__setitem__(5, tokens[4])), "1 tokens twice"),
    "no pair": (lists("merges", lambda merges: merges.append("ab")), "merges has 'ab', which isn't a pair"),
    "merge of nothing": (
        lists("merges", lambda merges: merges.append("a qqq")),
        "'a' and 'qqq', and not all are tokens",
    ),
    "end token": (sets("tokenizer.ggml.eos_token_id", 300), "eos_token_id=300, and there are 300 tokens"),
    "no first token": (
        lambda writer, tensors: [
            sets("tokenizer.ggml.add_bos_token", True)(writer, tensors),
            sets("tokenizer.ggml.bos_token_id", None)(writer, tensors),
        ],
        "a text needs a bos token, and the file names none",
    ),
    "template": (sets("tokenizer.chat_template", "{% if %}"), "the chat template fails on a plain prompt"),
    "no text": (sets("tokenizer.chat_template", 3), "tokenizer.chat_template is a int"),
}


def use(path):
    return check_folder(path, ParallelConfig(tp=2)), Tokenizer.of(path)


@pytest.mark.parametrize("case", [*REFUSED, *DAMAGED])
def test_what_is_wrong_is_told_by_file(tmp_path, case):
    change, said = {**REFUSED, **DAMAGED}[case]
    path = tmp_path / "model.gguf"
    tiny.write(path, "llama", ["Q8_0"], change)
    with pytest.raises(UnsupportedError if case in REFUSED else (CheckpointError, ConfigError)) as caught:
        use(path)
    message = str(caught.value)
    assert said in message
    assert message.count("model.gguf") == 1
    assert "\n" not in message


def test_what_changes_nothing_is_accepted(tmp_path):
    def change(writer, tensors):
        for key, value in {
            "llama.expert_count": 0,
            "llama.rope.scaling.type": "none",
            "llama.attention.key_length": 32,
            "llama.attention.causal": True,
            "general.tags": ["x"],
            "quantize.imatrix.file": "x",
            "tokenizer.ggml.seperator_token_id": 7,
            "tokenizer.ggml.add_space_prefix": False,
        }.items():
            sets(key, value)(writer, tensors)

    tiny.write(tmp_path / "m.gguf", "llama", ["Q8_0"], change)
    assert check_folder(tmp_path / "m.gguf", ParallelConfig(tp=8))
    with pytest.raises(ConfigError, match="tp=9 with 8 attention heads"):
        check_folder(tmp_path / "m.gguf", ParallelConfig(tp=9))


SCALINGS = [
    ({"rope.scaling.factor": 2.0}, ("linear", 2.0)),
    ({"rope.scale_linear": 3.0}, ("linear", 3.0)),
    ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.5}, ("linear", 1.5)),
    ({"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, ("default", 1.0)),
    ({"rope.scaling.factor": 0.0}, ("default", 1.0)),
    ({}, ("default", 1.0)),
]


@pytest.mark.parametrize(("keys", "expected"), SCALINGS)
def test_scalings_are_read_as_llama_cpp_reads_them(tmp_path, keys, expected):
    def change(writer, tensors):
        for key, value in keys.items():
            sets(f"llama.{key}", value)(writer, tensors)

    tiny.write(tmp_path / "m.gguf", "llama", ["Q8_0"], change)
    rope = describe(tmp_path / "m.gguf").rope
    assert (rope.kind, rope.factor) == expected


def test_a_sliding_window(tmp_path):
    tiny.write(tmp_path / "m.gguf", change=sets("llama.attention.sliding_window", 64))
    assert describe(tmp_path / "m.gguf").window == 64


def test_a_folder_of_gguf_files(tmp_path):
    tiny.write(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match=r"no config.json, but GGUF files: give the path of one"):
        check_folder(tmp_path, ParallelConfig())
