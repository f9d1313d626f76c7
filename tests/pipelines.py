"""Tiny random pipelines, components built as diffusers' own tests build theirs; prompts are embeddings.

Each builder returns ``(pipeline, arguments)``; :func:`sample` runs it and returns the final latents. Heads and widths
are odd where the model allows it, so that nothing divides by accident.
"""

import diffusers
import torch
from diffusers import AutoencoderKL

diffusers.utils.logging.set_verbosity_error()

FAMILIES = {}


def family(build):
    FAMILIES[build.__name__] = build
    return build


def build(name, **arguments):
    """The pipeline called ``name`` and its arguments, the same every time."""
    torch.manual_seed(0)
    pipe, defaults = FAMILIES[name]()
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"num_inference_steps": 3, **defaults, **arguments}


def sample(pipe, arguments, seed=0):
    """Final latents (DiT: the picture) of one run."""
    output = pipe(**arguments, generator=torch.Generator().manual_seed(seed))
    if isinstance(output, torch.Tensor):
        return output
    frames = getattr(output, "images", None)
    frames = frames if frames is not None else output.frames
    return torch.as_tensor(frames)  # DiT gives an array before diffusers 0.41


def embeds(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def last_bit(x):
    """``x`` with the last bit of its last number flipped."""
    x = x.clone().contiguous()
    x.view(torch.uint8).view(-1)[-x.element_size()] ^= 1
    return x


NEGATIVE, NEGATIVE_2 = embeds(1, 9, 32, seed=2), embeds(2, 9, 32, seed=2)


def mask(length, *kept, dtype=torch.long):
    """One row for each of ``kept``: that many ones, then zeros."""
    return torch.stack([(torch.arange(length) < k).to(dtype) for k in kept])


@family
def dit():
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
        out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipe = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler(clip_sample=False))
    return pipe, {"class_labels": [1, 5, 7], "guidance_scale": 3.0, "output_type": "pt"}


@family
def pixart():
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
        in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True, num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    pipe = diffusers.PixArtAlphaPipeline(
        None, None, tiny_vae(), transformer, diffusers.DDIMScheduler(clip_sample=False)
    )
    return pipe, {
        "prompt": None, "negative_prompt": None, "prompt_embeds": embeds(2, 9, 32),
        "prompt_attention_mask": mask(9, 7, 4),
        "negative_prompt_embeds": NEGATIVE_2, "negative_prompt_attention_mask": mask(9, 2, 2),
        "guidance_scale": 4.0, "use_resolution_binning": False, "height": 80, "width": 48, "output_type": "latent",
    }  # fmt: skip


def tiny_vae(**changes):
    """Four halvings, as pipelines expect of theirs (scale factor 8)."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(block_out_channels=(4,) * 4, norm_num_groups=2, latent_channels=4, **{**blocks, **changes})


@family
def sd3():
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=3,
        caption_projection_dim=24, joint_attention_dim=32, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=16, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.StableDiffusion3Pipeline(transformer, scheduler, tiny_vae(), *(None,) * 6)
    return pipe, {
        "prompt_embeds": embeds(1, 9, 32), "negative_prompt_embeds": NEGATIVE, "height": 80, "width": 48,
        "pooled_prompt_embeds": embeds(1, 16), "negative_pooled_prompt_embeds": embeds(1, 16, seed=2),
        "guidance_scale": 5.0, "output_type": "latent",
    }  # fmt: skip


def flux_transformer(**changes):
    sizes = {
        "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 3, "joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8),
    }  # fmt: skip
    return diffusers.FluxTransformer2DModel(**{**sizes, **changes})


@family
def flux():
    """Guidance-distilled: one call a step."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    transformer = flux_transformer(guidance_embeds=True)
    pipe = diffusers.FluxPipeline(scheduler, tiny_vae(), None, None, None, None, transformer)
    return pipe, {
        "prompt_embeds": embeds(1, 9, 32), "pooled_prompt_embeds": embeds(1, 16), "height": 80, "width": 48,
        "guidance_scale": 3.5, "output_type": "latent",
    }  # fmt: skip


@family
def flux_true_cfg():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.FluxPipeline(scheduler, tiny_vae(), None, None, None, None, flux_transformer())
    return pipe, {
        "prompt_embeds": embeds(1, 9, 32), "pooled_prompt_embeds": embeds(1, 16), "height": 80, "width": 48,
        "negative_prompt_embeds": NEGATIVE, "negative_pooled_prompt_embeds": embeds(1, 16, seed=2),
        "true_cfg_scale": 3.0, "output_type": "latent",
    }  # fmt: skip


@family
def flux2():
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=32, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4, norm_num_groups=1, latent_channels=4,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.Flux2KleinPipeline(scheduler, vae, None, None, transformer)
    return pipe, {
        "prompt_embeds": embeds(1, 9, 32), "negative_prompt_embeds": NEGATIVE, "height": 80, "width": 48,
        "guidance_scale": 4.0, "output_type": "latent",
    }  # fmt: skip


def wan_transformer(**changes):
    sizes = {
        "patch_size": (1, 2, 2), "num_attention_heads": 3, "attention_head_dim": 12, "in_channels": 16,
        "out_channels": 16, "text_dim": 32, "freq_dim": 32, "ffn_dim": 50, "num_layers": 2, "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
    }  # fmt: skip
    return diffusers.WanTransformer3DModel(**{**sizes, **changes})


@family
def wan():
    pipe = diffusers.WanPipeline(
        None, None, None, diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        wan_transformer(),
    )  # fmt: skip
    return pipe, {
        "prompt_embeds": embeds(1, 9, 32), "negative_prompt_embeds": NEGATIVE, "height": 48, "width": 48,
        "num_frames": 9, "guidance_scale": 5.0, "output_type": "latent",
    }  # fmt: skip


@family
def qwen_image():
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=32, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.QwenImagePipeline(scheduler, None, None, None, transformer)
    return pipe, {
        "prompt_embeds": embeds(2, 9, 32), "prompt_embeds_mask": mask(9, 9, 6), "true_cfg_scale": 4.0,
        "negative_prompt_embeds": NEGATIVE_2, "negative_prompt_embeds_mask": mask(9, 4, 3),
        "height": 80, "width": 48, "output_type": "latent",
    }  # fmt: skip


@family
def hunyuan_video():
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=32,
        pooled_projection_dim=16, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.HunyuanVideoPipeline(None, None, transformer, vae, scheduler, None, None)
    return pipe, {
        "prompt_embeds": embeds(1, 9, 32), "pooled_prompt_embeds": embeds(1, 16), "prompt_attention_mask": mask(9, 7),
        "negative_prompt_embeds": NEGATIVE, "negative_pooled_prompt_embeds": embeds(1, 16, seed=2),
        "negative_prompt_attention_mask": mask(9, 3), "true_cfg_scale": 3.0, "height": 48, "width": 48, "num_frames": 9,
        "output_type": "latent",
    }  # fmt: skip


@family
def cogvideox():
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=32, num_layers=2, sample_width=6, sample_height=6, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=9, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1,
        norm_num_groups=2, temporal_compression_ratio=4,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    )  # fmt: skip
    pipe = diffusers.CogVideoXPipeline(None, None, vae, transformer, diffusers.DDIMScheduler(clip_sample=False))
    return pipe, {
        "prompt_embeds": embeds(1, 9, 32), "negative_prompt_embeds": NEGATIVE, "height": 48, "width": 48,
        "num_frames": 9, "guidance_scale": 5.0, "output_type": "latent",
    }  # fmt: skip


@family
def ltx():
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=3, attention_head_dim=8,
        cross_attention_dim=24, num_layers=2, caption_channels=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(4, 4, 4, 4), decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, patch_size=1, patch_size_t=1, encoder_causal=True,
    )  # fmt: skip
    pipe = diffusers.LTXPipeline(diffusers.FlowMatchEulerDiscreteScheduler(), vae, None, None, transformer)
    return pipe, {
        "prompt_embeds": embeds(1, 9, 32), "prompt_attention_mask": mask(9, 7), "negative_prompt_embeds":
        NEGATIVE, "negative_prompt_attention_mask": mask(9, 3), "height": 32, "width": 32,
        "num_frames": 9, "guidance_scale": 3.0, "output_type": "latent",
    }  # fmt: skip
