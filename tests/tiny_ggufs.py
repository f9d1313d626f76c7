"""Tiny GGUF files of every architecture and type, with the transformers models that they stand for.

The gguf package, by the format's authors, writes the files, and turns blocks into numbers: in numpy, not by our code.
"""

import json

import gguf
import gguf.quants
import numpy as np
import tokenizers
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tiny_decoders import LLAMA3

TYPES = ["F32", "Q8_0", "Q4_K", "Q6_K", "Q5_0", "Q3_K", "F16", "Q4_0", "Q2_K", "BF16", "Q5_K", "Q4_1", "Q5_1"]
SCALES = {"Q2_K": (80, 0.01), "Q3_K": (108, 0.002), "Q4_K": (0, 5e-4), "Q5_K": (0, 2.5e-4), "Q6_K": (208, 1e-4)}
"""Of types that gguf can't write: where d is in a block, and a d that gives numbers around 0.1."""
MINIMA = {"Q2_K": (82, 0.01), "Q4_K": (2, 0.004), "Q5_K": (2, 0.004)}

SIZES = {"vocab_size": 300, "hidden_size": 256, "num_hidden_layers": 2, "max_position_embeddings": 256}
MODELS = {
    "llama": {"intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "rope_parameters": LLAMA3},
    "qwen2": {
        "intermediate_size": 544,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    },
    "qwen3": {"intermediate_size": 1024, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 32},
}
"""At tp=3 rows of 512, 544 and 1024 are cut inside a block, and so are the heads of the first."""

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}<|im_start|>"


def blocks(kind, rows, columns, generator):
    """Random rows of that type, as bytes."""
    if kind in SCALES:
        width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
        raw = generator.integers(0, 256, (rows, columns // 256, width), dtype=np.uint8)
        for at, scale in (SCALES[kind], *([MINIMA[kind]] if kind in MINIMA else [])):
            numbers = (scale * generator.uniform(0.5, 1, raw.shape[:2])).astype(np.float16)
            raw[..., at : at + 2] = numbers[..., None].view(np.uint8)
        return raw.reshape(rows, -1)
    numbers = generator.normal(0, 0.1, (rows, columns)).astype(np.float32)
    return gguf.quants.quantize(numbers, gguf.GGMLQuantizationType[kind]).view(np.uint8).reshape(rows, -1)


def numbers(kind, raw):
    """What they stand for, by gguf."""
    if kind in ("F32", "F16"):
        return raw.view(np.float32 if kind == "F32" else np.float16).astype(np.float32)
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])


def name_of(parameter):
    module, _, leaf = parameter.rpartition(".")
    if module.startswith("model.layers."):
        _, _, layer, rest = module.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.{leaf}"
    return f"{NAMES[module]}.{leaf}"


def in_pairs(array, heads):
    """The rows of queries or keys as llama's files have them: a head's halves, row by row."""
    head_dim = len(array) // heads
    return array.reshape(heads, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(array.shape)


def in_halves(array, heads):
    head_dim = len(array) // heads
    return array.reshape(heads, head_dim // 2, 2, -1).swapaxes(1, 2).reshape(array.shape)


def tensors(family, types=TYPES):
    """A transformers model of random weights, and the file's tensors by name: type and bytes or numbers."""
    known = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    config = getattr(transformers, f"{known}Config")(**SIZES, **MODELS[family], bos_token_id=None, eos_token_id=None)
    model = getattr(transformers, f"{known}ForCausalLM")(config).eval()
    generator, found = np.random.default_rng(len(family)), {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if parameter.dim() == 1:
            kind, raw = "F32", generator.normal(1.0 if "norm" in name else 0.0, 0.1, len(parameter)).astype(np.float32)
            value = raw
        else:
            rows, columns = parameter.shape
            fitting = [each for each in types if columns % (256 if each in SCALES else 32) == 0]
            kind = fitting[number % len(fitting)]
            raw = blocks(kind, rows, columns, generator)
            value = numbers(kind, raw)
        parameter.data = torch.tensor(in_halves(value, heads) if heads and family == "llama" else value)
        found[name_of(name)] = kind, raw
    if family == "llama":
        found["rope_freqs.weight"] = "F32", factors(config)
    return model, found


def factors(config):
    """By how much llama3's scaling divides each frequency."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 500000.0 ** (torch.arange(0, 32, 2).float() / 32)
    return (plain / scaled).numpy()


def metadata(writer, config, family):
    """Everything but the tokens, as llama.cpp's converter writes it."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_file_type(15)
    if family == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(32)
    if family == "qwen2":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
    if family == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)


SAID = ["the sea is calm tonight, 12 2024  and the moon lies fair\n\nwe're IT's"] * 3


def trained(size=300, texts=SAID):
    """A byte-level tokenizer: GPT-2's rule, four control tokens first."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return made


def words(writer, made, pre="gpt-2"):
    """The tokens of such a tokenizer."""
    model = json.loads(made.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    controls = {token.content for token in made.get_added_tokens_decoder().values()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in controls else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT)


def write(path, family="llama", types=TYPES, change=None, **options):
    """Write such a file; returns the model that it stands for.

    Args:
        change: called with the writer and the tensors (a dict) before they are written.
        options: of gguf's writer: ``split_max_tensors``, ``endianess``.
    """
    model, found = tensors(family, types)
    writer = gguf.GGUFWriter(path, family, **options)
    metadata(writer, model.config, family)
    words(writer, trained())
    if change is not None:
        change(writer, found)
    for name, (kind, raw) in found.items():
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
