"""The tiny pipelines with text encoders and autoencoders: prompts are words, and the result is a picture or a video.

Heads and widths of the encoders divide by no number of ranks.
"""

import string

import diffusers
import tokenizers
import torch
import transformers as hf

import more_pipelines  # noqa: F401  registers its families
import pipelines
import zoo

VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", *string.printable]
PROMPTS = {"prompt": "a cat", "negative_prompt": "dull, grey"}


def tokenizer(length=20, **special):
    """Every character is a token; sequences end with ``</s>``."""
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>")
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    model.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=model,
        model_max_length=length,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        **special,
    )


CLIP = {
    "vocab_size": 131, "num_hidden_layers": 2, "intermediate_size": 37, "max_position_embeddings": 77,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
T5 = {
    "vocab_size": 131, "d_model": 32, "d_kv": 6, "num_heads": 5, "d_ff": 45, "num_layers": 2,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip


def clip(width=12, heads=3, projection=None):
    sizes = {**CLIP, "hidden_size": width, "num_attention_heads": heads, "projection_dim": projection or 8}
    return (hf.CLIPTextModelWithProjection if projection else hf.CLIPTextModel)(hf.CLIPTextConfig(**sizes))


def t5(kind="T5"):
    return getattr(hf, f"{kind}EncoderModel")(getattr(hf, f"{kind}Config")(**T5))


DECODER = {
    "vocab_size": 131, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 6, "intermediate_size": 45, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip


def qwen():
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    text = {**DECODER, "rope_parameters": rope}
    del text["head_dim"]
    vision = {
        "depth": 1, "hidden_size": 20, "num_heads": 5, "intermediate_size": 30, "out_hidden_size": 32, "patch_size": 2,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    ids = {f"{name}_token_id": 120 + i for i, name in enumerate(("vision_start", "vision_end", "image", "video"))}
    return hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))


def causal_vae(kind, channels):
    return getattr(diffusers, kind)(
        base_dim=3, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * channels, latents_std=[1.0] * channels,
    )  # fmt: skip


def sana_vae():
    return diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_layers_per_block=(1, 1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1, 1), encoder_block_out_channels=(4,) * 6,
        decoder_block_out_channels=(4,) * 6, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_qkv_multiscales=((),) * 6, decoder_qkv_multiscales=((),) * 6, upsample_block_type="interpolate",
        downsample_block_type="stride_conv", decoder_norm_types="rms_norm", decoder_act_fns="silu",
    )  # fmt: skip


TEXT = {
    "stable_diffusion": lambda: {"text_encoder": clip(32, 4), "tokenizer": tokenizer()},
    "stable_diffusion_xl": lambda: {
        "text_encoder": clip(12), "text_encoder_2": clip(20, 5, 16),
        "tokenizer": tokenizer(), "tokenizer_2": tokenizer(),
    },
    "sd3": lambda: {
        "text_encoder": clip(12, 3, 7), "text_encoder_2": clip(20, 5, 9), "text_encoder_3": t5(),
        "tokenizer": tokenizer(), "tokenizer_2": tokenizer(), "tokenizer_3": tokenizer(),
        "vae": pipelines.tiny_vae(shift_factor=0.0),
    },
    "flux": lambda: {
        "text_encoder": clip(16, 2), "text_encoder_2": t5(), "tokenizer": tokenizer(), "tokenizer_2": tokenizer(),
        "vae": pipelines.tiny_vae(shift_factor=0.0),
    },
    "wan": lambda: {
        "text_encoder": t5("UMT5"), "tokenizer": tokenizer(), "vae": causal_vae("AutoencoderKLWan", 16),
    },
    "qwen_image": lambda: {
        "text_encoder": qwen(), "tokenizer": tokenizer(), "vae": causal_vae("AutoencoderKLQwenImage", 4),
    },
    "hunyuan_video": lambda: {
        "text_encoder": hf.LlamaModel(hf.LlamaConfig(**DECODER)), "text_encoder_2": clip(16, 2),
        "tokenizer": tokenizer(), "tokenizer_2": tokenizer(),
    },
    "ltx": lambda: {"text_encoder": t5(), "tokenizer": tokenizer()},
    "cogvideox": lambda: {"text_encoder": t5(), "tokenizer": tokenizer()},
    "pixart": lambda: {"text_encoder": t5(), "tokenizer": tokenizer()},
    "sana": lambda: {
        "text_encoder": hf.Gemma2Model(hf.Gemma2Config(**DECODER, query_pre_attn_scalar=6, sliding_window=7)),
        "tokenizer": tokenizer(), "vae": sana_vae(),
    },
}  # fmt: skip
"""The components to add to each pipeline."""

ARGUMENTS = {
    "sd3": {"max_sequence_length": 20},
    "flux": {"max_sequence_length": 20},
    "wan": {"max_sequence_length": 20},
    "hunyuan_video": {"max_sequence_length": 20},
    "ltx": {"max_sequence_length": 20},
    "cogvideox": {"max_sequence_length": 9},
    "pixart": {"max_sequence_length": 20, "clean_caption": False},
    "sana": {"max_sequence_length": 20, "clean_caption": False, "complex_human_instruction": None},
}


def build(name, **changes):
    """The pipeline called ``name`` and its arguments, the same every time."""
    pipe, arguments = pipelines.build(name)
    torch.manual_seed(1)
    for role, component in TEXT[name]().items():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
            if role.startswith("text"):
                zoo.scramble(component)
        pipe.register_modules(**{role: component})
    arguments = {key: value for key, value in arguments.items() if "prompt" not in key}
    refresh(pipe)
    guided = {} if name == "flux" else {"negative_prompt": PROMPTS["negative_prompt"]}
    given = {"prompt": PROMPTS["prompt"], **guided, "output_type": "pt", "num_inference_steps": 2}
    return pipe, {**arguments, **given, **ARGUMENTS.get(name, {}), **changes}


def refresh(pipe):
    """What a pipeline's constructor reads from its components: made again with all of them."""
    fresh = type(pipe)(**{**pipe.components, **pipe_options(pipe)})
    pipe.__dict__.update(fresh.__dict__)
    pipe.set_progress_bar_config(disable=True)


def pipe_options(pipe):
    return {"requires_safety_checker": False} if type(pipe).__name__ == "StableDiffusionPipeline" else {}
