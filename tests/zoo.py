"""Tiny models of many architectures: random weights, and sizes that divide by nothing."""

import torch
import transformers as hf

SIZES = {"vocab_size": 131, "hidden_size": 72, "num_hidden_layers": 2, "max_position_embeddings": 128}
IDS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
GQA = {"num_attention_heads": 9, "num_key_value_heads": 3}
LLAMA = {**SIZES, **IDS, **GQA, "intermediate_size": 85, "head_dim": 8}
MHA = {**SIZES, **IDS, "num_attention_heads": 6, "intermediate_size": 85}
MOE = {**LLAMA, "num_experts_per_tok": 2, "intermediate_size": 44}
MLA = {
    **SIZES, **IDS, "num_attention_heads": 6, "num_key_value_heads": 6, "q_lora_rank": 24, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12, "intermediate_size": 85,
    "moe_intermediate_size": 20, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
GPT2 = {"vocab_size": 131, "n_embd": 60, "n_layer": 2, "n_head": 5, "n_positions": 128, "n_inner": 85, **IDS}

ANY = {
    **MOE, "moe_intermediate_size": 20, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
"""Sizes that most decoders understand; what one doesn't know, it ignores."""
LATENT = ("axk1", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu")


def generic(kind):
    return hf.AutoConfig.for_model(kind, **({**ANY, **MLA} if kind in LATENT else ANY))


DECODERS = {
    "bloom": lambda: hf.BloomConfig(vocab_size=131, hidden_size=60, n_layer=2, n_head=5, **IDS),
    "cohere": lambda: hf.CohereConfig(**{**LLAMA, "use_qk_norm": True}),
    "cohere2": lambda: hf.Cohere2Config(**LLAMA, sliding_window=7),
    "deepseek_v2": lambda: hf.DeepseekV2Config(**MLA, topk_method="greedy"),
    "deepseek_v3": lambda: hf.DeepseekV3Config(**MLA),
    "falcon": lambda: hf.FalconConfig(**MHA, new_decoder_architecture=False, multi_query=True),
    "falcon-alibi": lambda: hf.FalconConfig(**MHA, alibi=True, multi_query=False, bias=True),
    "falcon-40b": lambda: hf.FalconConfig(**MHA, new_decoder_architecture=True, num_kv_heads=3),
    "gemma": lambda: hf.GemmaConfig(**LLAMA),
    "gemma2": lambda: hf.Gemma2Config(**LLAMA, sliding_window=7, query_pre_attn_scalar=8),
    "gemma3": lambda: hf.Gemma3TextConfig(**LLAMA, sliding_window=7, query_pre_attn_scalar=8),
    "glm": lambda: hf.GlmConfig(**LLAMA),
    "glm4": lambda: hf.Glm4Config(**LLAMA),
    "glm4_moe": lambda: generic("glm4_moe"),
    "gpt2": lambda: hf.GPT2Config(**GPT2),
    "gpt_bigcode": lambda: hf.GPTBigCodeConfig(**GPT2, multi_query=True),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        vocab_size=131, hidden_size=60, num_layers=2, num_heads=5, intermediate_size=85, window_size=7,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=128, **IDS,
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**MHA),
    "gpt_oss": lambda: hf.GptOssConfig(**{**MOE, "num_local_experts": 4, "sliding_window": 7}),
    "gptj": lambda: hf.GPTJConfig(**GPT2, rotary_dim=4),
    "granite": lambda: hf.GraniteConfig(**LLAMA),
    "helium": lambda: hf.HeliumConfig(**LLAMA),
    "llama": lambda: hf.LlamaConfig(**LLAMA),
    "llama4": lambda: generic("llama4_text"),
    "llama-tied": lambda: hf.LlamaConfig(**LLAMA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "ministral": lambda: hf.MinistralConfig(**LLAMA, sliding_window=7),
    "mistral": lambda: hf.MistralConfig(**LLAMA, sliding_window=7),
    "mixtral": lambda: hf.MixtralConfig(**MOE, num_local_experts=4),
    "mpt": lambda: hf.MptConfig(vocab_size=131, d_model=60, n_layers=2, n_heads=5, max_seq_len=128, **IDS),
    "nemotron": lambda: hf.NemotronConfig(**LLAMA),
    "olmo": lambda: hf.OlmoConfig(**LLAMA),
    "olmo2": lambda: hf.Olmo2Config(**LLAMA),
    "olmo3": lambda: hf.Olmo3Config(**LLAMA, sliding_window=7),
    "olmoe": lambda: hf.OlmoeConfig(**MOE, num_experts=4),
    "opt": lambda: hf.OPTConfig(
        vocab_size=131, hidden_size=60, num_hidden_layers=2, num_attention_heads=5, ffn_dim=85,
        max_position_embeddings=128, word_embed_proj_dim=60, **IDS,
    ),
    "phi": lambda: hf.PhiConfig(**{**MHA, "num_key_value_heads": 3}),
    "phi3": lambda: hf.Phi3Config(**LLAMA, original_max_position_embeddings=128),
    "phimoe": lambda: hf.PhimoeConfig(**MOE, num_local_experts=4),
    "qwen2": lambda: hf.Qwen2Config(**LLAMA),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(
        **MOE, num_experts=4, moe_intermediate_size=20, shared_expert_intermediate_size=30, decoder_sparse_step=1
    ),
    "qwen3": lambda: hf.Qwen3Config(**LLAMA),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**MOE, num_experts=4, moe_intermediate_size=20, decoder_sparse_step=1),
    "seed_oss": lambda: hf.SeedOssConfig(**LLAMA),
    "smollm3": lambda: hf.SmolLM3Config(**LLAMA),
    "stablelm": lambda: hf.StableLmConfig(**{**LLAMA, "use_qkv_bias": True}),
    "starcoder2": lambda: hf.Starcoder2Config(**LLAMA),
    "xglm": lambda: hf.XGLMConfig(
        vocab_size=131, d_model=60, ffn_dim=85, num_layers=2, attention_heads=5, max_position_embeddings=128, **IDS
    ),
}  # fmt: skip

ENCODER = {"hidden_size": 60, "num_hidden_layers": 2, "num_attention_heads": 5, "intermediate_size": 85}
ENCODERS = {
    "albert": lambda: hf.AlbertConfig(vocab_size=131, max_position_embeddings=64, embedding_size=60, **ENCODER),
    "bert": lambda: hf.BertConfig(vocab_size=131, max_position_embeddings=64, **ENCODER),
    "clip_text": lambda: hf.CLIPTextConfig(vocab_size=131, max_position_embeddings=64, eos_token_id=2, **ENCODER),
    "dinov2": lambda: hf.Dinov2Config(image_size=16, patch_size=4, **ENCODER),
    "distilbert": lambda: hf.DistilBertConfig(
        vocab_size=131, max_position_embeddings=64, dim=60, n_heads=5, hidden_dim=85, n_layers=2
    ),
    "electra": lambda: hf.ElectraConfig(vocab_size=131, max_position_embeddings=64, embedding_size=60, **ENCODER),
    "mpnet": lambda: hf.MPNetConfig(vocab_size=131, max_position_embeddings=64, **ENCODER),
    "mt5_encoder": lambda: hf.MT5Config(vocab_size=131, d_model=60, d_kv=12, num_heads=5, d_ff=85, num_layers=2),
    "roberta": lambda: hf.RobertaConfig(vocab_size=131, max_position_embeddings=64, **ENCODER),
    "siglip_text": lambda: hf.SiglipTextConfig(vocab_size=131, max_position_embeddings=64, **ENCODER),
    "t5_encoder": lambda: hf.T5Config(vocab_size=131, d_model=60, d_kv=12, num_heads=5, d_ff=85, num_layers=2),
    "umt5_encoder": lambda: hf.UMT5Config(
        vocab_size=131, d_model=60, d_kv=12, num_heads=5, d_ff=85, num_layers=2, feed_forward_proj="gated-gelu"
    ),
    "vit": lambda: hf.ViTConfig(image_size=16, patch_size=4, **ENCODER),
}
CLASSES = {
    "clip_text": "CLIPTextModel",
    "mt5_encoder": "MT5EncoderModel",
    "siglip_text": "SiglipTextModel",
    "t5_encoder": "T5EncoderModel",
    "umt5_encoder": "UMT5EncoderModel",
}


NO_SEQUENCE = {
    "bloom", "falcon", "falcon-40b", "falcon-alibi", "gemma2", "gpt_neo", "gpt_oss", "gptj", "llama4", "mpt", "opt",
    "xglm", *ENCODERS,
}  # fmt: skip
"""Architectures whose sequence isn't split: refused by name."""

WHOLE_ATTENTION = {"olmo2", "olmo3"}
"""Whose norm spans all heads: every rank computes their attention, so a larger share of the parameters stays."""


def build(name):
    """The same random model in every process: weights large enough for every part to matter."""
    torch.manual_seed(0)
    if name in DECODERS or name not in ENCODERS:
        model = hf.AutoModelForCausalLM.from_config(DECODERS[name]() if name in DECODERS else generic(name))
    elif name in CLASSES:
        model = getattr(hf, CLASSES[name])(ENCODERS[name]())
    else:
        model = hf.AutoModel.from_config(ENCODERS[name]())
    return scramble(model)


def scramble(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1 and "norm" not in name:
            parameter.data = noise * (1.5 / parameter.shape[-1] ** 0.5)
        else:
            parameter.data = 0.3 * noise + ("norm" in name.lower() or "ln_" in name) * 1.0
    return model.eval()


def inputs(name):
    generator = torch.Generator().manual_seed(2)
    if name in ("dinov2", "vit"):
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, 131, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    if name in ENCODERS:
        mask[0, 9:] = 0
    else:
        mask[0, :3] = 0
    ids[mask == 0] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def forward(model, name):
    """Logits, or the last hidden state; rows that are padding count for nothing."""
    given = inputs(name)
    out = model(**given)
    y = out.logits if "logits" in out else out.last_hidden_state
    return y[given["attention_mask"].bool()] if "attention_mask" in given else y


def tokens(model, name, **kwargs):
    given = inputs(name)
    return model.generate(**given, max_new_tokens=8, do_sample=False, **kwargs)[:, given["input_ids"].shape[1] :]


def on_mesh(mesh, config, fn, *args):
    """The pool's mesh is any of its size; build the one that the test asked for."""
    import multicard as mc

    return fn(mc.init_mesh(config), *args)


def measure(mesh, oracles):
    """On a rank, every architecture split and compared with one process."""
    return {name: measure_one(mesh, name, *oracle) for name, oracle in oracles.items()}


def measure_one(mesh, name, logits, tokens_alone):
    import multicard as mc

    model = build(name)
    whole = sum(parameter.numel() for parameter in model.parameters())
    try:
        mc.parallelize(model, mesh)
    except mc.errors.UnsupportedError as refusal:
        return str(refusal)
    share = sum(parameter.numel() for parameter in model.parameters()) / whole
    error = relative_error(forward(model, name), logits)
    same = tokens_alone is None or torch.equal(tokens(model, name), tokens_alone)
    return error, same, share


def relative_error(y, reference):
    """The largest difference over the reference's largest value."""
    assert y.shape == reference.shape
    return float((y.double() - reference.double()).abs().max() / reference.double().abs().max())
