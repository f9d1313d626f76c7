"""Plans of models whose pipelines need text encoders of their own: one forward of each against one process."""

import diffusers
import pytest
import torch

import autoencoders
import multicard as mc
import unets
from multicard.errors import UnsupportedError
from pipelines import embeds, mask

MODELS = {}
FLUX_LIKE = {
    "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 3, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip
PLACES = torch.stack([torch.zeros(15), torch.arange(15) // 3, torch.arange(15) % 3], 1)  # of 5 × 3 image tokens


def model(build):
    MODELS[build.__name__] = build
    return build


def flux_like_arguments(**more):
    return {
        "hidden_states": embeds(2, 15, 16), "encoder_hidden_states": embeds(2, 7, 32, seed=2), "img_ids": PLACES,
        "timestep": torch.tensor([0.3, 0.7]), "txt_ids": torch.zeros(7, 3), **more,
    }  # fmt: skip


@model
def bria():
    return diffusers.BriaTransformer2DModel(**FLUX_LIKE), flux_like_arguments()


@model
def longcat_image():
    sizes = {**FLUX_LIKE, "axes_dims_rope": [4, 4, 8], "pooled_projection_dim": 16}
    return diffusers.LongCatImageTransformer2DModel(**sizes), flux_like_arguments()


@model
def ovis_image():
    return diffusers.OvisImageTransformer2DModel(**FLUX_LIKE), flux_like_arguments()


@model
def cogview3_plus():
    sizes = {
        "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 3, "text_embed_dim": 32, "time_embed_dim": 8, "condition_dim": 2,
        "pos_embed_max_size": 8, "sample_size": 8,
    }  # fmt: skip
    size = torch.tensor([[40.0, 24.0]])
    return diffusers.CogView3PlusTransformer2DModel(**sizes), {
        "hidden_states": embeds(1, 4, 10, 6), "encoder_hidden_states": embeds(1, 7, 32, seed=2),
        "timestep": torch.tensor([5]), "original_size": size, "target_size": size, "crop_coords": size * 0,
    }  # fmt: skip


@model
def skyreels():
    sizes = {
        "patch_size": (1, 2, 2), "num_attention_heads": 3, "attention_head_dim": 12, "in_channels": 4,
        "out_channels": 4, "text_dim": 32, "freq_dim": 32, "ffn_dim": 50, "num_layers": 2, "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
    }  # fmt: skip
    return diffusers.SkyReelsV2Transformer3DModel(**sizes), {
        "hidden_states": embeds(1, 4, 3, 10, 6), "encoder_hidden_states": embeds(1, 7, 32, seed=2),
        "timestep": torch.tensor([5]),
    }  # fmt: skip


@model
def hunyuan_dit():
    sizes = {
        "sample_size": 16, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 3,
        "in_channels": 4, "cross_attention_dim": 32, "cross_attention_dim_t5": 32, "pooled_projection_dim": 16,
        "hidden_size": 24, "activation_fn": "gelu-approximate", "text_len": 7, "text_len_t5": 5,
    }  # fmt: skip
    return diffusers.HunyuanDiT2DModel(**sizes), {
        "hidden_states": embeds(1, 4, 16, 16), "timestep": torch.tensor([5.0]),
        "encoder_hidden_states": embeds(1, 7, 32), "text_embedding_mask": mask(7, 4),
        "encoder_hidden_states_t5": embeds(1, 5, 32), "text_embedding_mask_t5": mask(5, 2),
        "image_meta_size": torch.tensor([[64.0, 64, 64, 64, 0, 0]]), "style": torch.tensor([0]),
        "image_rotary_emb": (embeds(64, 8), embeds(64, 8)),
    }  # fmt: skip


@model
def latte():
    sizes = {
        "sample_size": 8, "num_layers": 1, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 3,
        "caption_channels": 32, "in_channels": 4, "cross_attention_dim": 24, "out_channels": 8, "video_length": 3,
        "attention_bias": True, "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": 1e-6,
    }  # fmt: skip
    return diffusers.LatteTransformer3DModel(**sizes), {
        "hidden_states": embeds(1, 4, 3, 8, 8), "encoder_hidden_states": embeds(1, 7, 32), "timestep": torch.tensor([5])
    }  # fmt: skip


@model
def allegro():
    sizes = {
        "num_attention_heads": 3, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 1,
        "cross_attention_dim": 36, "sample_width": 8, "sample_height": 8, "sample_frames": 8, "caption_channels": 24,
    }  # fmt: skip
    places = [torch.arange(48) // 16, torch.arange(48) // 4 % 4, torch.arange(48) % 4]
    turns = [(torch.stack([places[i].cos()] * 4, 1), torch.stack([places[i].sin()] * 4, 1)) for i in range(3)]
    return diffusers.AllegroTransformer3DModel(**sizes), {
        "hidden_states": embeds(1, 4, 3, 8, 8), "timestep": torch.tensor([5]),
        "encoder_hidden_states": embeds(1, 7, 24), "encoder_attention_mask": mask(7, 4),
        "attention_mask": torch.ones(1, 3, 8, 8),
        "image_rotary_emb": (tuple(turns), tuple(p[None] for p in places)),
    }  # fmt: skip


@model
def kandinsky22():
    """Its attention is outside transformer blocks, which our plan of U-Nets names."""
    case = unets.UNETS["kandinsky22"]
    return case.build(), case.inputs(6)


def build(name):
    torch.manual_seed(0)
    denoiser, arguments = MODELS[name]()
    return denoiser.eval().requires_grad_(False), arguments


def outcomes(mesh):
    """For each model its error relative to one process, or why it was refused."""
    found = {}
    for name in MODELS:
        denoiser, arguments = build(name)
        expected = denoiser(**arguments).sample
        try:
            mc.parallelize(denoiser, mesh)
        except UnsupportedError as error:
            found[name] = str(error)
            continue
        error = (denoiser(**arguments).sample - expected).abs().max() / expected.abs().max()
        found[name] = float(error) if expected.abs().max() > 1e-3 else float("nan")
    return found


NO_SEQUENCE = {"hunyuan_dit", "latte", "allegro"}
NO_TENSOR = {"ovis_image", "kandinsky22"}


@pytest.mark.parametrize(
    ("degrees", "refused"),
    [({"ulysses": 2}, NO_SEQUENCE), ({"ring": 3}, NO_SEQUENCE), ({"tp": 2}, NO_TENSOR), ({"tp": 3}, NO_TENSOR)],
    ids=str,
)
def test_exact_or_refused(run_on, degrees, refused):
    for found in run_on(outcomes, **degrees):
        assert {name for name, outcome in found.items() if isinstance(outcome, str)} == refused
        assert all("plan=" in outcome for outcome in found.values() if isinstance(outcome, str))
        assert all(outcome < 1e-5 for outcome in found.values() if not isinstance(outcome, str)), found


def edits(mesh):
    torch.manual_seed(0)
    unet = unets.UNETS["sd15"].build()
    unet.register_to_config(sample_size=64)  # the pipeline compares it
    others = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = diffusers.LEditsPPPipelineStableDiffusion(
        unet=unet,
        vae=autoencoders.AUTOENCODERS["kl"].build(),
        scheduler=diffusers.DDIMScheduler(),
        requires_safety_checker=False,
        **others,
    )
    with pytest.raises(UnsupportedError, match="averages attention maps over all heads"):
        mc.parallelize(pipe, mesh)


def test_attention_maps_of_split_heads_are_refused(run_on):
    run_on(edits, tp=2)
