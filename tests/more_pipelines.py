"""More tiny pipelines: other ways to guide (skipped layers, perturbed attention, two experts, lists, U-Nets)."""

import diffusers
import torch

from pipelines import NEGATIVE, NEGATIVE_2, embeds, family, mask, sd3, tiny_vae, wan, wan_transformer

SQUARE = {"height": 80, "width": 48, "output_type": "latent"}


@family
def sd3_skip_layers():
    """Three branches on some steps: a batch of two, and one more without a layer."""
    pipe, arguments = sd3()
    return pipe, {
        **arguments, "skip_guidance_layers": [1], "skip_layer_guidance_scale": 2.0, "skip_layer_guidance_start": 0.0,
        "skip_layer_guidance_stop": 0.6, "num_inference_steps": 4,
    }  # fmt: skip


@family
def sd3_pag():
    """Three branches in one batch, told apart inside the attention processors: can't be split, stays exact."""
    pipe, arguments = sd3()
    transformer = pipe.transformer
    pipe = diffusers.StableDiffusion3PAGPipeline(
        transformer, pipe.scheduler, pipe.vae, *(None,) * 6, pag_applied_layers=["blocks.1"]
    )
    return pipe, {**arguments, "pag_scale": 2.0}


@family
def wan_two_experts():
    pipe, arguments = wan()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.WanPipeline(None, None, None, scheduler, pipe.transformer, wan_transformer(), boundary_ratio=0.8)
    return pipe, {**arguments, "guidance_scale_2": 3.0, "num_inference_steps": 5}


@family
def auraflow():
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=3, joint_attention_dim=32, caption_projection_dim=24, out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.AuraFlowPipeline(None, None, tiny_vae(), transformer, scheduler)
    return pipe, {
        **SQUARE, "prompt_embeds": embeds(1, 9, 32), "prompt_attention_mask": mask(9, 9), "guidance_scale": 3.0,
        "negative_prompt_embeds": NEGATIVE, "negative_prompt_attention_mask": mask(9, 9),
    }  # fmt: skip


@family
def chroma():
    """Masks as the pipeline takes them: bool, and added to scores, as its text encoder makes them."""
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_num_channels=16, approximator_hidden_dim=24,
        approximator_layers=1,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.ChromaPipeline(scheduler, tiny_vae(), None, None, transformer)
    return pipe, {
        **SQUARE, "prompt_embeds": embeds(1, 9, 32), "guidance_scale": 3.0,
        "prompt_attention_mask": mask(9, 7, dtype=torch.bool), "negative_prompt_embeds": NEGATIVE,
        "negative_prompt_attention_mask": mask(9, 3, dtype=torch.float32),
    }  # fmt: skip


@family
def sana():
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=8, num_layers=1,
        cross_attention_dim=24, num_cross_attention_heads=3, cross_attention_head_dim=8, caption_channels=32,
        sample_size=32,
    )  # fmt: skip
    pipe = diffusers.SanaPipeline(None, None, None, transformer, diffusers.FlowMatchEulerDiscreteScheduler())
    return pipe, {
        **SQUARE, "height": 96, "width": 64, "prompt_embeds": embeds(2, 9, 32), "guidance_scale": 3.0,
        "prompt_attention_mask": mask(9, 7, 5),
        "negative_prompt_embeds": NEGATIVE_2, "negative_prompt_attention_mask": mask(9, 3, 3), "negative_prompt": None,
        "use_resolution_binning": False,
    }  # fmt: skip


@family
def lumina2():
    """Sequential, without guidance for the last steps; captions of two lengths, padded and masked."""
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, multiple_of=8,
        num_attention_heads=3, num_kv_heads=1, axes_dim_rope=(4, 2, 2), axes_lens=(64, 64, 64), cap_feat_dim=32,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.Lumina2Pipeline(transformer, scheduler, tiny_vae(), None, None)
    return pipe, {
        **SQUARE, "prompt_embeds": embeds(2, 9, 32), "prompt_attention_mask": mask(9, 7, 4), "guidance_scale": 3.0,
        "negative_prompt_embeds": NEGATIVE_2, "negative_prompt_attention_mask": mask(9, 3, 2), "cfg_trunc_ratio": 0.5,
        "num_inference_steps": 5,
    }  # fmt: skip


@family
def z_image():
    """The batch is a list, of captions padded to two lengths."""
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=48, n_layers=1, n_refiner_layers=1, n_heads=3,
        n_kv_heads=3, cap_feat_dim=32, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.ZImagePipeline(scheduler, tiny_vae(), None, None, transformer)
    return pipe, {
        **SQUARE, "prompt_embeds": [embeds(33, 32), embeds(5, 32)], "guidance_scale": 3.0,
        "negative_prompt_embeds": [embeds(4, 32, seed=2), embeds(4, 32, seed=2)],
    }  # fmt: skip


@family
def cogview4():
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=3,
        text_embed_dim=32, time_embed_dim=16, condition_dim=4, pos_embed_max_size=32, sample_size=16,
        rope_axes_dim=(16, 16),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    pipe = diffusers.CogView4Pipeline(None, None, tiny_vae(), transformer, scheduler)
    return pipe, {
        **SQUARE, "prompt_embeds": embeds(1, 9, 32), "negative_prompt_embeds": embeds(1, 6, 32, seed=2),
        "guidance_scale": 3.0,
    }  # fmt: skip


@family
def stable_diffusion(in_channels=4):
    """A U-Net, one batch."""
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=16, in_channels=in_channels, out_channels=4,
        norm_num_groups=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=4,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(steps_offset=1)
    pipe = diffusers.StableDiffusionPipeline(
        tiny_vae(), None, None, unet, scheduler, None, None, requires_safety_checker=False
    )
    return pipe, {
        **SQUARE, "prompt_embeds": embeds(2, 9, 32), "negative_prompt_embeds": NEGATIVE_2, "guidance_scale": 3.0,
    }  # fmt: skip


@family
def stable_diffusion_xl():
    """A U-Net that is also given the picture's size and pooled text."""
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        norm_num_groups=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32, attention_head_dim=4,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(steps_offset=1)
    pipe = diffusers.StableDiffusionXLPipeline(
        tiny_vae(), None, None, None, None, unet, scheduler, add_watermarker=False
    )
    return pipe, {
        **SQUARE, "prompt_embeds": embeds(2, 9, 32), "negative_prompt_embeds": NEGATIVE_2, "guidance_scale": 3.0,
        "pooled_prompt_embeds": embeds(2, 16), "negative_pooled_prompt_embeds": embeds(2, 16, seed=3),
    }  # fmt: skip


@family
def hidream():
    """Text embeddings with the batch in dim 1."""
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=3, caption_channels=[32, 16], text_emb_dim=16, num_routed_experts=2,
        num_activated_experts=1, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=[0, 1],
        force_inference_output=True,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.HiDreamImagePipeline(scheduler, tiny_vae(), *(None,) * 8, transformer)
    pipe.default_sample_size = 8  # every picture is scaled to this size: 4096 tokens otherwise
    return pipe, {
        **SQUARE, "prompt_embeds_t5": embeds(1, 9, 32), "prompt_embeds_llama3": embeds(2, 1, 9, 16),
        "negative_prompt_embeds_t5": NEGATIVE, "negative_prompt_embeds_llama3": embeds(2, 1, 9, 16, seed=2),
        "pooled_prompt_embeds": embeds(1, 16), "negative_pooled_prompt_embeds": embeds(1, 16, seed=2),
        "guidance_scale": 3.0, "height": 64, "width": 64,
    }  # fmt: skip


@family
def mochi():
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=3, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=12, text_embed_dim=32, time_embed_dim=4, max_sequence_length=9,
    )  # fmt: skip
    pipe = diffusers.MochiPipeline(diffusers.FlowMatchEulerDiscreteScheduler(), None, None, None, transformer)
    return pipe, {
        "height": 32, "width": 48, "num_frames": 7, "output_type": "latent", "prompt_embeds": embeds(1, 9, 32),
        "prompt_attention_mask": mask(9, 7, dtype=torch.bool), "negative_prompt_embeds": NEGATIVE,
        "negative_prompt_attention_mask": mask(9, 3, dtype=torch.bool), "guidance_scale": 3.0,
    }  # fmt: skip


def hunyuan_image(guider):
    """Branches by a guider: a loop of calls with hooks put on and taken off around each."""
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=8, num_layers=2, num_single_layers=1,
        num_refiner_layers=1, patch_size=(1, 1), text_embed_dim=32, text_embed_2_dim=24, rope_axes_dim=(4, 4),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = diffusers.HunyuanImagePipeline(scheduler, None, None, None, None, None, transformer, guider, guider)
    return pipe, {
        "prompt_embeds": embeds(1, 9, 32), "prompt_embeds_mask": mask(9, 7), "prompt_embeds_2": embeds(1, 5, 24),
        "prompt_embeds_mask_2": mask(5, 4), "negative_prompt_embeds": NEGATIVE, "height": 320, "width": 192,
        "negative_prompt_embeds_mask": mask(9, 3), "negative_prompt_embeds_2": embeds(1, 5, 24, seed=2),
        "negative_prompt_embeds_mask_2": mask(5, 2), "num_inference_steps": 5, "output_type": "latent",
    }  # fmt: skip


@family
def guider_cfg():
    return hunyuan_image(diffusers.ClassifierFreeGuidance(guidance_scale=3.0, start=0.1, stop=0.7))


@family
def guider_apg():
    guider = diffusers.AdaptiveProjectedGuidance(guidance_scale=3.0, adaptive_projected_guidance_momentum=0.5)
    return hunyuan_image(guider)


@family
def guider_slg():
    """Three branches, the third without a block."""
    skipped = diffusers.LayerSkipConfig(indices=[1], fqn="transformer_blocks")
    return hunyuan_image(
        diffusers.SkipLayerGuidance(
            guidance_scale=3.0, skip_layer_guidance_scale=2.0, skip_layer_config=skipped, skip_layer_guidance_stop=0.5
        )
    )


@family
def guider_auto():
    """Two branches, the second by a model without some of its layers."""
    weaker = diffusers.LayerSkipConfig(indices=[0], fqn="transformer_blocks")
    return hunyuan_image(diffusers.AutoGuidance(guidance_scale=2.0, auto_guidance_config=weaker))


@family
def modular_wan():
    """Blocks instead of a pipeline class: the guider loops over calls of the denoiser."""
    pipe = diffusers.modular_pipelines.wan.modular_blocks_wan.WanCoreDenoiseStep().init_pipeline()
    pipe.update_components(
        transformer=wan_transformer(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0, stop=0.8),
    )  # fmt: skip
    return pipe, {
        "prompt_embeds": embeds(1, 9, 32), "negative_prompt_embeds": NEGATIVE, "height": 48, "width": 48,
        "num_frames": 9, "num_inference_steps": 5, "output": "latents",
    }  # fmt: skip


@family
def instruct_pix2pix():
    """Three branches in one batch, with another image latent each."""
    pipe, arguments = stable_diffusion(in_channels=8)
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(
        pipe.vae, None, None, pipe.unet, pipe.scheduler, None, None, requires_safety_checker=False
    )
    del arguments["height"], arguments["width"]
    image = embeds(2, 3, 80, 48).sigmoid()
    return pipe, {**arguments, "image": image, "image_guidance_scale": 1.5, "num_inference_steps": 4}


@family
def controlnet_heun():
    """Two calls a step, and a network beside the denoiser."""
    pipe, arguments = stable_diffusion()
    net = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4,) * 4)
    for parameter in net.controlnet_mid_block.parameters():
        torch.nn.init.normal_(parameter)
    pipe = diffusers.StableDiffusionControlNetPipeline(
        pipe.vae, None, None, pipe.unet, net, diffusers.HeunDiscreteScheduler(), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    return pipe, {**arguments, "image": embeds(2, 3, 80, 48).sigmoid()}
