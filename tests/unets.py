"""Tiny random U-Nets of diffusers and what goes beside them: control networks, adapters, networks on video latents.

``UNETS[name]`` says how to build one and what it takes for a number of latent rows; :func:`forward` runs it. Sizes
are as the pipelines of that name have them, channels and layers are few.
"""

from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch

from autoencoders import noise, wake

UNETS = {}
COLUMNS = 8
TEXT = 24
"""Width of the text embeddings."""


@dataclass(frozen=True)
class UNet:
    """``build()`` seeds nothing; ``inputs(rows)`` are the arguments of ``forward``, the same every time."""

    build: Callable[[], torch.nn.Module]
    inputs: Callable[[int], dict]
    multiple: int = 1
    """What ``rows`` have to be a multiple of."""


def add(name, kind, config, inputs, multiple=1, prepare=None):
    """One entry of the table; ``prepare(model)`` sets what no configuration says."""

    def build():
        model = getattr(diffusers, kind)(**config)
        if prepare:
            prepare(model)
        return wake(model)

    UNETS[name] = UNet(build, inputs, multiple)


@torch.no_grad()
def forward(model, case, rows):
    """All tensors that the model gives, in order."""
    output = model(**case.inputs(rows))
    return flat(output.values() if isinstance(output, dict) else output)


def flat(output):
    if isinstance(output, torch.Tensor):
        return [output]
    return [tensor for part in output for tensor in flat(part)]


def text(channels=4, batch=2, frames=(), **more):
    """Arguments of most: noise of (batch, channels, [frames,] rows, columns), a step, and embeddings of nine tokens.

    A function in ``more`` is called with ``rows``, and gives one.
    """

    def inputs(rows):
        return {
            "sample": noise(batch, channels, *frames, rows, COLUMNS), "timestep": torch.tensor(37),
            "encoder_hidden_states": noise(batch, 9, TEXT, seed=4),
            **{key: value(rows) if callable(value) else value for key, value in more.items()},
        }  # fmt: skip

    return inputs


def level(rows, halvings):
    """Rows and columns after convolutions of stride 2 and padding 1."""
    return -(-rows // 2**halvings), COLUMNS // 2**halvings


# Stable Diffusion

SD = {
    "block_out_channels": (8, 12, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": TEXT,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 2,
}  # fmt: skip
UP = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")}
add("sd15", "UNet2DConditionModel", {**SD, **UP}, text())
add("sd-inpaint", "UNet2DConditionModel", {**SD, **UP, "in_channels": 9}, text(channels=9))

PADDED = (torch.arange(9) < torch.tensor([[7], [4]])).float()
SD2 = {**SD, **UP, "use_linear_projection": True, "attention_head_dim": (1, 3, 4), "upcast_attention": True}
add("sd2", "UNet2DConditionModel", SD2, text(encoder_attention_mask=PADDED))

add(
    "sd-upscale", "UNet2DConditionModel",
    {**SD2, "in_channels": 7, "num_class_embeds": 10, "only_cross_attention": (True, True, False)},
    text(channels=7, class_labels=torch.tensor([3, 7])),
)  # fmt: skip


def residuals(rows):
    """What a control network adds: after the first convolution, each block and each halving."""
    shapes = ((8, 0), (8, 0), (8, 1), (12, 1), (12, 2), (16, 2))
    return tuple(noise(2, channels, *level(rows, halvings), seed=5) for channels, halvings in shapes)


add(
    "sd-residuals", "UNet2DConditionModel", {**SD, **UP},
    text(
        down_block_additional_residuals=residuals,
        mid_block_additional_residual=lambda rows: noise(2, 16, *level(rows, 2), seed=6),
    ),
)  # fmt: skip


def features(rows):
    """What a T2I adapter adds: one for each level. The model takes them off the list."""
    return [noise(2, channels, *level(rows, halvings), seed=7) for halvings, channels in enumerate((8, 12, 16))]


add("sd-features", "UNet2DConditionModel", {**SD, **UP}, text(down_intrablock_additional_residuals=features))


def image_prompts(model):
    """An IP-Adapter, put in as its loader does."""
    from diffusers.models import embeddings
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    image = embeddings.ImageProjection(20, TEXT, num_image_text_embeds=4)
    model.encoder_hid_proj = embeddings.MultiIPAdapterImageProjection([image])
    model.register_to_config(encoder_hid_dim_type="ip_image_proj")
    for name, module in model.named_modules():
        if name.endswith("attn2"):
            module.set_processor(IPAdapterAttnProcessor2_0(module.inner_dim, TEXT, num_tokens=(4,)))


IMAGE = {"image_embeds": [noise(2, 1, 20, seed=8)]}
add("sd-ip-adapter", "UNet2DConditionModel", {**SD, **UP}, text(added_cond_kwargs=IMAGE), prepare=image_prompts)

SDXL = {
    **SD, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": (1, 2, 3), "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 16,
}  # fmt: skip
SDXL_UP = {"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}
POOLED = {
    "text_embeds": noise(2, 16, seed=9),
    "time_ids": torch.tensor([[80, 48, 0, 0, 80, 48], [64, 64, 8, 0, 80, 48]]),
}
add("sdxl", "UNet2DConditionModel", {**SDXL, **SDXL_UP}, text(added_cond_kwargs=POOLED))

# Control networks and adapters: pixels are eight times the latents.


def pixels(rows):
    return noise(2, 3, 8 * rows, 8 * COLUMNS, seed=10)


def loud(model):
    """Pixels pass eight convolutions, and what torch starts them with leaves a hundred-thousandth."""
    for convolution in model.controlnet_cond_embedding.modules():
        if isinstance(convolution, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(convolution.weight)


HINT = {"conditioning_embedding_out_channels": (4, 4, 8, 8)}
add("controlnet", "ControlNetModel", {**SD, **HINT}, text(controlnet_cond=pixels), prepare=loud)
add(
    "controlnet-pooled", "ControlNetModel", {**SD, **HINT, "global_pool_conditions": True},
    text(controlnet_cond=pixels, conditioning_scale=0.7), prepare=loud,
)  # fmt: skip
add(
    "controlnet-sdxl", "ControlNetModel", {**SDXL, **HINT},
    text(controlnet_cond=pixels, added_cond_kwargs=POOLED), prepare=loud,
)  # fmt: skip

UNION = {"num_control_type": 3, "num_trans_channel": 8, "num_trans_head": 2, "num_proj_channel": 8}
add(
    "controlnet-union", "ControlNetUnionModel", {**SDXL, **HINT, **UNION}, text(
        controlnet_cond=lambda rows: [pixels(rows), pixels(rows).flip(-1)], control_type_idx=[0, 2],
        control_type=torch.tensor([[1.0, 0.0, 1.0]] * 2), added_cond_kwargs=POOLED, conditioning_scale=[0.7, 0.4],
    ), prepare=loud,
)  # fmt: skip
add(
    "controlnet-xs", "UNetControlNetXSModel", {
        "block_out_channels": (8, 12, 16), "norm_num_groups": 4, "cross_attention_dim": TEXT, "num_attention_heads": 2,
        "down_block_types": SD["down_block_types"], **UP, "ctrl_block_out_channels": (4, 4, 8),
        "ctrl_num_attention_heads": 2, "ctrl_max_norm_num_groups": 4, "upcast_attention": False,
        "ctrl_conditioning_embedding_out_channels": (4, 4, 8, 8),
    }, text(controlnet_cond=pixels), multiple=4, prepare=loud,
)  # fmt: skip

for kind in ("full_adapter", "full_adapter_xl", "light_adapter"):
    T2I = {"channels": [8, 12, 16, 16], "num_res_blocks": 1, "downscale_factor": 8, "adapter_type": kind}
    add(f"t2i-{kind}", "T2IAdapter", T2I, lambda rows: {"x": pixels(rows)}, multiple=2 if kind.endswith("xl") else 1)

# Without text

PLAIN = {"block_out_channels": (8, 12), "layers_per_block": 1, "norm_num_groups": 4, "in_channels": 3}


def plain(rows):
    return {"sample": noise(2, 3, rows, COLUMNS), "timestep": torch.tensor([37, 11])}


add(
    "unet2d", "UNet2DModel", {
        **PLAIN, "down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "add_attention": False,
    }, plain, multiple=2,
)  # fmt: skip
add(
    "unet2d-attention", "UNet2DModel", {
        **PLAIN, "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"), "attention_head_dim": 4,
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"), "num_class_embeds": 10, "downsample_padding": 0,
    }, lambda rows: {**plain(rows), "class_labels": torch.tensor([3, 7])}, multiple=2,
)  # fmt: skip
add(
    "unet2d-skip", "UNet2DModel", {
        **PLAIN, "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"), "time_embedding_type": "fourier",
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"), "block_out_channels": (32, 32),
        "norm_num_groups": None, "mid_block_scale_factor": 2**0.5,
    }, plain, multiple=2,
)  # fmt: skip
"""NCSN++: halvings and doublings filtered by a kernel of four."""

# Videos: noise of (batch, channels, frames, rows, columns), and of (batch, frames, channels, rows, columns) for SVD

MOTION = {
    "block_out_channels": (8, 12, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": TEXT,
    "num_attention_heads": 2, "motion_num_attention_heads": 2, "motion_max_seq_length": 8,
    "down_block_types": ("CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion"),
}  # fmt: skip
FRAMES = 3


def repeated(rows):
    return noise(2, 9, TEXT, seed=4).repeat_interleave(FRAMES, 0)


add("motion", "UNetMotionModel", MOTION, text(frames=(FRAMES,), encoder_hidden_states=repeated))

SPARSE = {key: MOTION[key] for key in MOTION if key not in ("up_block_types", "num_attention_heads")}
add(
    "sparse-controlnet", "SparseControlNetModel", {**SPARSE, **HINT, "attention_head_dim": 2}, text(
        frames=(FRAMES,), encoder_hidden_states=repeated,
        controlnet_cond=lambda rows: noise(2, 4, FRAMES, rows, COLUMNS, seed=5),
        conditioning_mask=lambda rows: torch.ones(2, 1, FRAMES, rows, COLUMNS),
    ),
)  # fmt: skip
"""Conditions are of the latents' size, and the noise counts for nothing but its shape."""

add(
    "svd", "UNetSpatioTemporalConditionModel", {
        "block_out_channels": (32, 32, 64), "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24,
        "layers_per_block": 1, "cross_attention_dim": TEXT, "num_attention_heads": (2, 2, 4), "num_frames": FRAMES,
        "down_block_types": (*("CrossAttnDownBlockSpatioTemporal",) * 2, "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", *("CrossAttnUpBlockSpatioTemporal",) * 2),
    }, lambda rows: {
        "sample": noise(2, FRAMES, 8, rows, COLUMNS), "timestep": torch.tensor(37),
        "encoder_hidden_states": noise(2, 1, TEXT, seed=4), "added_time_ids": torch.tensor([[6, 127, 0.02]] * 2),
    },
)  # fmt: skip

CUBES = {
    **SD, "down_block_types": ("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"), "attention_head_dim": 4,
}  # fmt: skip
add("unet3d", "UNet3DConditionModel", CUBES, text(frames=(FRAMES,)))
add(
    "i2vgen", "I2VGenXLUNet", CUBES, text(
        frames=(FRAMES,), batch=1, fps=torch.tensor([8]), image_embeddings=noise(1, TEXT, seed=8),
        image_latents=lambda rows: noise(1, 4, FRAMES, rows, COLUMNS, seed=5),
    ),
)  # fmt: skip

# Others

add(
    "kandinsky22", "UNet2DConditionModel", {
        "block_out_channels": (8, 16), "out_channels": 8, "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), "cross_attention_dim": TEXT,
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), "attention_head_dim": 4,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "addition_embed_type": "image", "encoder_hid_dim": 20,
        "encoder_hid_dim_type": "image_proj", "resnet_time_scale_shift": "scale_shift",
    }, text(encoder_hidden_states=None, added_cond_kwargs={"image_embeds": noise(2, 20, seed=8)}), multiple=2,
)  # fmt: skip
add(
    "kandinsky3", "Kandinsky3UNet", {
        "time_embedding_dim": 16, "groups": 2, "attention_head_dim": 4, "layers_per_block": 2,
        "block_out_channels": (8, 8, 16, 16), "cross_attention_dim": 16, "encoder_hid_dim": TEXT,
    }, text(encoder_attention_mask=PADDED), multiple=8,
)  # fmt: skip

CASCADE = {
    "in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 8, "conditioning_dim": 16,
    "block_out_channels": (16, 24), "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1),
    "clip_text_pooled_in_channels": TEXT, "dropout": 0.1,
}  # fmt: skip


def cascade(**more):
    def inputs(rows):
        return {
            "sample": noise(2, 4, rows, COLUMNS), "timestep_ratio": torch.tensor([0.4, 0.7]),
            "clip_text_pooled": noise(2, 1, TEXT, seed=4), **{key: value(rows) for key, value in more.items()},
        }  # fmt: skip

    return inputs


add(
    "cascade-prior", "StableCascadeUNet",
    {**CASCADE, "num_attention_heads": (2, 3), "switch_level": (False,), "clip_text_in_channels": TEXT,
     "clip_image_in_channels": 20},
    cascade(clip_text=lambda rows: noise(2, 9, TEXT, seed=5), clip_img=lambda rows: noise(2, 1, 20, seed=6)),
)  # fmt: skip
add(
    "cascade-decoder", "StableCascadeUNet", {
        **CASCADE, "patch_size": 2, "num_attention_heads": (-1, 3), "effnet_in_channels": 5,
        "pixel_mapper_in_channels": 3, "up_blocks_repeat_mappers": (2, 2), "down_blocks_repeat_mappers": (1, 2),
        "block_types_per_layer": (
            ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
    }, cascade(effnet=lambda rows: noise(2, 5, 3, 4, seed=5), pixels=lambda rows: noise(2, 3, 8, 8, seed=6)),
    multiple=4,
)  # fmt: skip
"""Its conditions are maps of another size: stretched to the rows (bilinear, corners aligned)."""

add(
    "uvit", "UVit2DModel", {
        "hidden_size": 24, "cond_embed_dim": 16, "micro_cond_encode_dim": 8, "micro_cond_embed_dim": 40,
        "encoder_hidden_size": TEXT, "vocab_size": 40, "codebook_size": 32, "in_channels": 12,
        "block_out_channels": 12, "num_res_blocks": 1, "downsample": True, "upsample": True, "block_num_heads": 3,
        "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 40,
    }, lambda rows: {
        "input_ids": (noise(2, rows, COLUMNS).abs() * 12).long(), "encoder_hidden_states": noise(2, 9, TEXT, seed=4),
        "pooled_text_emb": noise(2, 16, seed=5), "micro_conds": torch.tensor([[80.0, 48.0, 0.0, 0.0, 6.0]] * 2),
    }, multiple=2,
)  # fmt: skip

add(
    "dreamlite", "DreamLiteUNetModel", {
        **SDXL, "attention_head_dim": 2, "transformer_layers_per_block": 1,
        "down_block_types": (*("CrossAttnDownRemoveSelfAttnBlock2D",) * 2, "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpRemoveSelfAttnBlock2DV1", "UpBlock2D"),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
    }, text(added_cond_kwargs=POOLED),
)  # fmt: skip
