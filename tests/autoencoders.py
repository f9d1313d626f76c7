"""Tiny random autoencoders of diffusers, one of every convolutional class: few channels, two levels, odd rows.

``AUTOENCODERS[name]`` says how to build one and what shapes it takes; :func:`decode` and :func:`encode` run it on
seeded inputs. ``rows`` are rows of latents: any number, where the table doesn't say otherwise. The frames of latents
and of pixels are as many as pass between the chunks that the model works in, so that what it keeps of one is used.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import diffusers
import torch

diffusers.utils.logging.set_verbosity_error()

AUTOENCODERS = {}


@dataclass(frozen=True)
class Autoencoder:
    """``build()`` seeds nothing; ``latents(rows)`` and ``pixels(rows)`` are shapes, of four or five dimensions."""

    build: Callable[[], torch.nn.Module]
    latents: Callable[[int], tuple[int, ...]]
    pixels: Callable[[int], tuple[int, ...]]
    decode_args: dict = field(default_factory=dict)
    """More arguments of ``decode``; a function is called with ``rows``, and gives one."""
    encode: bool = True


def add(name, kind, config, channels=4, scale=2, frames=(), batch=1, colours=3, columns=4, prepare=None, **more):
    """One entry of the table: a class by name, its configuration, and what shapes follow from.

    ``channels`` and ``columns`` are the latents', ``scale`` the pixels a latent spans each way, ``frames`` the frames
    of latents and of pixels (none: pictures), and ``prepare(model)`` sets what no configuration says.
    """

    def build():
        model = wake(getattr(diffusers, kind)(**config))
        if prepare:
            prepare(model)
        return model

    AUTOENCODERS[name] = Autoencoder(
        build,
        lambda rows: (batch, channels, *frames[:1], rows, columns),
        lambda rows: (batch, colours, *frames[1:], rows * scale, columns * scale),
        **more,
    )


@torch.no_grad()
def wake(model):
    """``model`` in eval mode, with noise on every parameter that starts as a constant.

    Biases, gates and whole layers start as zeros, and scales as ones: a part that is left out, or is given the wrong
    channel, would change nothing.
    """
    for parameter in model.parameters():
        if parameter.min() == parameter.max():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.add_(torch.randn_like(parameter) / fan_in**0.5)
    return model.eval().requires_grad_(False)


def noise(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def decode(model, case, rows):
    """Pixels of seeded latents. Noise that a decoder draws from torch's own generator is seeded too."""
    args = {key: value(rows) if callable(value) else value for key, value in case.decode_args.items()}
    torch.manual_seed(0)
    output = model.decode(noise(*case.latents(rows)), **args)
    return output if isinstance(output, torch.Tensor) else output.sample


@torch.no_grad()
def encode(model, case, rows):
    """Latents of seeded pixels: the mode of their distribution, where there is one."""
    output = model.encode(noise(*case.pixels(rows)))
    if isinstance(output, tuple):  # VidTok: latents, and codes or a loss
        return output[0]
    if "latent_dist" in output:
        return output.latent_dist.mode()
    return output["latents" if "latents" in output else "latent"]


def blocks(down, up, channels, **more):
    """A configuration with the same kind of block at every level."""
    levels = len(channels)
    return {
        "down_block_types": (down,) * levels, "up_block_types": (up,) * levels, "block_out_channels": channels,
        "norm_num_groups": 4, "latent_channels": 4, "layers_per_block": 1, **more,
    }  # fmt: skip


# Pictures

KL = blocks("DownEncoderBlock2D", "UpDecoderBlock2D", (8, 12))
add("kl", "AutoencoderKL", KL, batch=2)
add("kl-three-levels", "AutoencoderKL", {**KL, **blocks("DownEncoderBlock2D", "UpDecoderBlock2D", (8, 4, 12))}, scale=4)
add("kl-without-attention", "AutoencoderKL", {**KL, "mid_block_add_attention": False, "use_quant_conv": False})
add("flux2", "AutoencoderKLFlux2", KL)

ASYMMETRIC = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "down_block_out_channels": (4, 4, 8, 8), "norm_num_groups": 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "up_block_out_channels": (8, 8, 12, 12), "latent_channels": 4,
}  # fmt: skip
add("asymmetric", "AsymmetricAutoencoderKL", ASYMMETRIC, scale=8)
add(
    "asymmetric-mask", "AsymmetricAutoencoderKL", ASYMMETRIC, scale=8, decode_args={
        "image": lambda rows: noise(1, 3, 8 * rows, 32, seed=4),
        "mask": lambda rows: (noise(1, 1, 8 * rows, 32, seed=5) > 0).float(),
    },
)  # fmt: skip
"""What is left of the picture is encoded too, and the decoder looks each result up by its shape."""

DC = {
    "latent_channels": 4, "attention_head_dim": 4, "encoder_block_out_channels": (8, 8, 16),
    "decoder_block_out_channels": (8, 8, 16), "encoder_layers_per_block": (0, 1, 1),
    "decoder_layers_per_block": (0, 1, 1), "encoder_qkv_multiscales": ((),) * 3, "decoder_qkv_multiscales": ((),) * 3,
}  # fmt: skip
add("dc", "AutoencoderDC", DC, scale=4)
add(
    "dc-linear-attention", "AutoencoderDC", {
        **DC, "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"), "encoder_layers_per_block": (1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1), "downsample_block_type": "conv", "upsample_block_type": "interpolate",
        "encoder_qkv_multiscales": ((), (), (5,)), "decoder_qkv_multiscales": ((), (), (5,)),
        "decoder_norm_types": ("batch_norm", "batch_norm", "rms_norm"), "decoder_act_fns": ("relu", "relu", "silu"),
    }, scale=4,
)  # fmt: skip

VQ = blocks("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D", (8, 12), num_vq_embeddings=32)
add("vq", "VQModel", VQ)
add("vq-spatial-norm", "VQModel", {**VQ, "block_out_channels": (32, 32), "norm_type": "spatial"})

TINY = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
TINY |= {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
add("tiny", "AutoencoderTiny", TINY, scale=4, batch=2)
add("tiny-bilinear", "AutoencoderTiny", {**TINY, "act_fn": "gelu", "upsample_fn": "bilinear"}, scale=4)

add(
    "consistency", "ConsistencyDecoderVAE", {
        "encoder_block_out_channels": (8, 12), "encoder_down_block_types": ("DownEncoderBlock2D",) * 2,
        "encoder_norm_num_groups": 4, "decoder_block_out_channels": (8, 12), "decoder_norm_num_groups": 4,
        "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2, "decoder_layers_per_block": 1,
        "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2, "encoder_layers_per_block": 1,
    }, decode_args={"generator": lambda rows: torch.Generator().manual_seed(6)},
)  # fmt: skip

add(
    "hunyuan_image", "AutoencoderKLHunyuanImage", {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 64),
        "layers_per_block": 1, "spatial_compression_ratio": 2, "sample_size": 32,
    },
)  # fmt: skip

add(
    "kvae", "AutoencoderKLKVAE",
    {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 2)},
)  # fmt: skip

RAE = {
    "encoder_hidden_size": 64, "encoder_patch_size": 4, "encoder_num_hidden_layers": 1, "encoder_input_size": 28,
    "decoder_hidden_size": 24, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 3,
    "decoder_intermediate_size": 40, "patch_size": 4,
}  # fmt: skip
AUTOENCODERS["rae"] = Autoencoder(
    lambda: wake(diffusers.AutoencoderRAE(**RAE)), lambda rows: (1, 64, 7, 7), lambda rows: (1, 3, 4 * rows, 16)
)
"""Two transformers. Pixels are resized to 28 by 28 before all else (bicubic), so latents are always 7 by 7."""

# Videos

ALLEGRO = blocks("AllegroDownBlock3D", "AllegroUpBlock3D", (8, 12), temporal_compression_ratio=2)
ALLEGRO |= {"temporal_downsample_blocks": (True, False), "temporal_upsample_blocks": (False, True)}


def allegro_tiles(model):
    """Nothing is implemented but tiles, of one size: 4 frames, 3 by 3 latents, one of overlap."""
    model.enable_tiling()
    model.kernel, model.stride = (4, 6, 6), (2, 4, 4)
    model.tile_overlap_t, model.tile_overlap_h, model.tile_overlap_w = 2, 2, 2


add("allegro", "AutoencoderKLAllegro", ALLEGRO, frames=(3, 6), columns=5, prepare=allegro_tiles)
"""Rows are odd: three, and two for each tile more."""

add(
    "cogvideox", "AutoencoderKLCogVideoX",
    blocks("CogVideoXDownBlock3D", "CogVideoXUpBlock3D", (8, 12), temporal_compression_ratio=2), frames=(9, 17),
)  # fmt: skip

add(
    "cosmos", "AutoencoderKLCosmos", {
        "latent_channels": 4, "encoder_block_out_channels": (8, 8, 8, 12),
        "decode_block_out_channels": (8, 8, 8, 12), "attention_resolutions": (16,), "resolution": 64,
        "num_layers": 1, "patch_size": 2, "spatial_compression_ratio": 4, "temporal_compression_ratio": 4,
    }, scale=4, frames=(3, 9),
)  # fmt: skip

add(
    "hunyuan_video", "AutoencoderKLHunyuanVideo", blocks(
        "HunyuanVideoDownBlock3D", "HunyuanVideoUpBlock3D", (8, 8, 12), spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    ), scale=4, frames=(3, 9),
)  # fmt: skip

HUNYUAN = {"latent_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1}
HUNYUAN |= {"spatial_compression_ratio": 2, "temporal_compression_ratio": 2}
add("hunyuan_image_refiner", "AutoencoderKLHunyuanImageRefiner", HUNYUAN, frames=(3, 3))
add("hunyuan_video15", "AutoencoderKLHunyuanVideo15", HUNYUAN, frames=(3, 5))

add(
    "kvae_video", "AutoencoderKLKVAEVideo",
    {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 4, "temporal_compress_times": 2}, frames=(11, 21),
)  # fmt: skip

LTX = {
    "latent_channels": 8, "block_out_channels": (8, 8), "decoder_block_out_channels": (8, 16), "patch_size": 2,
    "layers_per_block": (1, 1, 1), "decoder_layers_per_block": (1, 1, 1), "decoder_inject_noise": (False,) * 3,
    "spatio_temporal_scaling": (True, True), "decoder_spatio_temporal_scaling": (True, True),
    "upsample_residual": (False, False), "upsample_factor": (1, 1),
}  # fmt: skip
LTX |= {"down_block_types": ("LTXVideoDownBlock3D",) * 2, "downsample_type": ("conv", "conv")}
add("ltx", "AutoencoderKLLTXVideo", LTX, channels=8, scale=8, frames=(2, 5), columns=3)

NOISY = {
    **LTX, "decoder_inject_noise": (True,) * 3, "timestep_conditioning": True, "upsample_residual": (True, True),
    "upsample_factor": (2, 2), "decoder_block_out_channels": (8, 16), "block_out_channels": (8, 8, 16),
    "down_block_types": ("LTXVideo095DownBlock3D",) * 2, "downsample_type": ("spatial", "spatiotemporal"),
}  # fmt: skip
add(
    "ltx-noise", "AutoencoderKLLTXVideo", NOISY, channels=8, scale=8, frames=(3, 5), columns=3,
    decode_args={"temb": torch.tensor([0.05])},
)  # fmt: skip

LTX2 = {**LTX, "down_block_types": ("LTX2VideoDownBlock3D",) * 2, "upsample_residual": (True, True)}
LTX2 |= {"downsample_type": ("spatial", "spatiotemporal"), "upsample_type": ("spatiotemporal", "spatial")}
LTX2 |= {"upsample_factor": (2, 2)}
add("ltx2", "AutoencoderKLLTX2Video", LTX2, channels=8, scale=8, frames=(3, 5), columns=3)

MAGVIT = blocks("SpatialTemporalDownBlock3D", "SpatialTemporalUpBlock3D", (8, 12, 12))
MAGVIT |= {"down_block_types": ("SpatialDownBlock3D", *MAGVIT["down_block_types"][1:])}
MAGVIT |= {"up_block_types": ("SpatialUpBlock3D", *MAGVIT["up_block_types"][1:])}
add("magvit", "AutoencoderKLMagvit", MAGVIT, scale=4, frames=(5, 9))

add(
    "minimax_h3", "AutoencoderKLMiniMaxH3", {
        "latent_channels": 4, "block_out_channels": (8, 12), "layers_per_block": 1, "norm_num_groups": 4,
        "spatial_downsample_factors": (2, 2), "temporal_downsample_factors": (1, 2), "decoder_num_layers": 1,
        "decoder_num_attention_heads": 3, "decoder_attention_head_dim": 8, "decoder_num_register_tokens": 2,
        "decoder_ffn_mult": 2, "clip_length": 5, "token_drop": 1, "latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4,
    }, scale=4, frames=(5, 10),
)  # fmt: skip
"""Convolutions encode, a transformer decodes."""

add(
    "mochi", "AutoencoderKLMochi", {
        "latent_channels": 4, "encoder_block_out_channels": (32, 32), "decoder_block_out_channels": (32, 32),
        "layers_per_block": (1, 1, 1), "temporal_expansions": (2,), "spatial_expansions": (2,),
        "add_attention_block": (False, True, True), "latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4,
    }, frames=(3, 5),
)  # fmt: skip

QWEN = {"base_dim": 6, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True]}
QWEN |= {"latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4}
add("qwen_image", "AutoencoderKLQwenImage", QWEN, frames=(3, 5))
RESIDUAL = {**QWEN, "dim_mult": [1, 2, 2], "temperal_downsample": [False, True], "decoder_base_dim": 8}
add("qwen_image21", "AutoencoderKLQwenImage21", RESIDUAL, scale=4, colours=4, frames=(1, 1))
"""Pictures, as videos of one frame."""

add("wan", "AutoencoderKLWan", QWEN, frames=(3, 5), batch=2)
add(
    "wan-residual-patch", "AutoencoderKLWan", {
        **RESIDUAL, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
        "scale_factor_spatial": 8,
    }, scale=8, frames=(3, 5), columns=3,
)  # fmt: skip

add(
    "temporal_decoder", "AutoencoderKLTemporalDecoder", {
        "down_block_types": ("DownEncoderBlock2D",) * 2, "block_out_channels": (32, 32), "layers_per_block": 2,
    }, batch=6, decode_args={"num_frames": 3},
)  # fmt: skip

VIDTOK = {"ch": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "tempo_ds": (0,), "tempo_us": (1,)}
add("vidtok", "AutoencoderVidTok", VIDTOK, frames=(3, 6))
add(
    "vidtok-codes", "AutoencoderVidTok", {
        **VIDTOK, "is_causal": False, "regularizer": "fsq", "double_z": False, "codebook_size": 8**4,
    }, frames=(8, 16),
)  # fmt: skip

add(
    "kandinsky6_sr", "Kandinsky6SRVAE", {
        "latent_channels": 4, "encoder_block_out_channels": (4, 8, 16), "decoder_block_out_channels": (4, 8, 16),
        "layers_per_block": 1, "temporal_compression_ratio": 4, "temporal_compression_start_level": 0,
    }, scale=4, frames=(6, 21), columns=3,
)  # fmt: skip
