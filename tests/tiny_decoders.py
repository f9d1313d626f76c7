"""Tiny random checkpoints of every family, with sizes that divide by nothing, made with transformers."""

import torch
import transformers

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
COMMON = {"vocab_size": 1003, "intermediate_size": 177, "num_hidden_layers": 2, "max_position_embeddings": 256}
CHECKPOINTS = {
    "llama-7-heads": ("Llama", {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 7}),
    "llama-6-over-2": (
        "Llama",
        {
            "hidden_size": 48,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "rope_parameters": LLAMA3,
            "tie_word_embeddings": True,
        },
    ),
    "llama-biases": (
        "Llama",
        {
            "hidden_size": 40,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "head_dim": 10,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        },
    ),
    "mistral-5-over-1": (
        "Mistral",
        {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1, "sliding_window": None},
    ),
    "qwen2-6-over-2": (
        "Qwen2",
        {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "qwen3-9-over-3": (
        "Qwen3",
        {"hidden_size": 44, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 12},
    ),
}


def model(name, dtype=torch.float32):
    """The transformers model, every parameter random: biases and norms too, which start as 0 and 1."""
    family, sizes = CHECKPOINTS[name]
    config = getattr(transformers, f"{family}Config")(**COMMON, **sizes, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(len(name))
    built = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in built.parameters():
        centre = 1.0 if parameter.dim() == 1 and parameter.mean() == 1 else 0.0
        parameter.data.normal_(centre, 0.2 if parameter.dim() == 1 else 0.15)
    return built.to(dtype)


def write(folder, name, dtype=torch.float32, **options):
    """Save it in ``folder/name``; returns the path and the model."""
    built = model(name, dtype)
    built.save_pretrained(folder / name, **options)
    return folder / name, built


def prompts(name):
    """Token ids of unequal lengths, one of a single token."""
    generator = torch.Generator().manual_seed(len(name))
    return [torch.randint(1003, (length,), generator=generator).tolist() for length in (23, 1, 9)]
