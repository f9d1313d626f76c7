# ruff: noqa: SIM905  lists of names are easier to read and compare as one string
"""How each ``diffusers`` model is split: a table. What a style does is in ``styles``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from multicard.guidance import BatchPlan

_DIM_0 = """
    hidden_states sample timestep timesteps t encoder_hidden_states encoder_attention_mask attention_mask guidance
    timestep_cond class_labels controlnet_block_samples controlnet_single_block_samples encoder_hidden_states_image
    pooled_projections encoder_hidden_states_t5 encoder_hidden_states_mask timestep_r r_timestep target_size crop_coords
    original_size input_ids image_embeds audio_hidden_states down_block_additional_residuals
    mid_block_additional_residual down_intrablock_additional_residuals context_latents global_hidden_states
    block_controlnet_hidden_states padding_mask encoder_hidden_states_2 encoder_attention_mask_2 ofs id_cond
    id_vit_hidden text_embedding_mask text_embedding_mask_t5 image_meta_size style encoder_mask proj_embedding
    condition_mask inpaint_latents control_latents text_bth text_lens image_cond_hidden_states target_timestep
    prior_token_id prior_token_drop latents_history_short latents_history_mid latents_history_long latents_clean
    latents_history_2x latents_history_4x pooled_embeds hidden_states_masks latent_cond audio_encoder_hidden_states
    audio_timestep sigma audio_sigma audio_encoder_attention_mask additional_t_cond control_hidden_states
    pose_hidden_states face_pixel_values image_latents image_embeddings added_time_ids timestep_ratio clip_text_pooled
    clip_text clip_img effnet pixels sca crp pooled_text_emb micro_conds encoder_hidden_states_1
    encoder_attention_mask_1 position_ids segment_ids indicator token_type local_add_cond video_coords audio_coords
    img_sizes c r clip img_mask
    text_embeds time_ids resolution aspect_ratio ip_adapter_image_embeds ip_hidden_states image_hidden_states
    text_hidden_states negative_mask hint text_encoder_layers
""".split()

_ITEMS = "x cap_feats siglip_feats image_noise_mask img_shapes txt_seq_lens shape_list input_img_latents img_sizes"

BATCH = BatchPlan(
    sample=("hidden_states", "sample", "x", "latents"),
    dims={**dict.fromkeys([*_DIM_0, "x"], 0), "encoder_hidden_states_llama3": 1},
    items=frozenset(_ITEMS.split()),
)
"""Arguments of diffusers' denoisers that carry the batch; rotary embeddings, position ids, layer numbers and scales
don't. If one is missing here, a call just can't be split, since every split call is first compared with the whole."""


@dataclasses.dataclass(frozen=True)
class SequencePlan:
    """Where a model's image tokens are split over the sequence axis, and where they are gathered.

    Text tokens stay whole on every rank: they are few, and attention handles them as joint tokens.

    Attributes:
        attention: patterns of the attention modules in which queries and keys are the image tokens (and joint tokens).
            Other attention, such as cross-attention to text, needs no change.
        joint: the place of joint tokens in those modules: "front" or "rear" of the image tokens.
        inputs: by module pattern, the dim to split of each argument. None and tensors without that dim aren't changed.
        outputs: by module pattern, the dim to split of each output, by number.
        gather: by module pattern, the dim along which its output is gathered; then another sequence may be split.
        outer_mask: an argument ``(B, joint and image tokens)``; the model's attention mask is its outer product with
            itself, bool or added to scores.
        whole: exceptions to the model's own ``_cp_plan``, which aren't split: argument names, "module.number".
        refused: by argument or config entry, the values that the plan covers; any other is refused.
    """

    attention: tuple[str, ...]
    joint: str = "front"
    inputs: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    outputs: Mapping[str, Mapping[int, int]] = dataclasses.field(default_factory=dict)
    gather: Mapping[str, int] = dataclasses.field(default_factory=dict)
    whole: tuple[str, ...] = ()
    refused: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    outer_mask: str | None = None

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of all modules in the plan."""
        return (*self.attention, *self.inputs, *self.outputs, *self.gather)


def _alike(classes: str, plan: Any) -> dict[str, Any]:
    return dict.fromkeys(classes.split(), plan)


_TWO_STREAMS = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")
_SELF = ("transformer_blocks.*.attn1",)
_TEXT = ("encoder_hidden_states", "encoder_attention_mask", "encoder_hidden_states_mask", "txt_ids")
_CONTROL = {"controlnet_block_samples": 1, "controlnet_single_block_samples": 1}
_FIRST = {"transformer_blocks.0": {"hidden_states": 1}}
_EMBEDDED = {"pos_embed": {0: 1}}
_ROPE = {"rope": {0: 0, 1: 0}}
_OUT = {"proj_out": 1}
_REFINED = "{noise_refiner,layers}"  # text is refined whole, image tokens split; then both are one split sequence

SEQUENCE: dict[str, SequencePlan] = {
    "FluxTransformer2DModel": SequencePlan(_TWO_STREAMS, whole=_TEXT, inputs={"": _CONTROL}),
    "Flux2Transformer2DModel": SequencePlan(_TWO_STREAMS, whole=_TEXT, refused={"kv_cache_mode": (None,)}),
    "QwenImageTransformer2DModel": SequencePlan(
        ("transformer_blocks.*.attn",), whole=(*_TEXT, "pos_embed.1"), inputs={"": _CONTROL}
    ),
    **_alike("WanTransformer3DModel ChronoEditTransformer3DModel", SequencePlan(("blocks.*.attn1",))),
    "LTXVideoTransformer3DModel": SequencePlan(_SELF, whole=_TEXT, inputs={"": {"timestep": 1}}),
    "DiTTransformer2DModel": SequencePlan(_SELF, outputs=_EMBEDDED, gather={"proj_out_2": 1}),
    "PixArtTransformer2DModel": SequencePlan(
        _SELF, outputs=_EMBEDDED, gather=_OUT, refused={"attention_mask": (None,)}
    ),
    "SD3Transformer2DModel": SequencePlan(
        ("transformer_blocks.*.attn", "transformer_blocks.*.attn2"),
        joint="rear",
        inputs={"": {"block_controlnet_hidden_states": 1}},
        outputs=_EMBEDDED,
        gather=_OUT,
    ),
    "HunyuanVideoTransformer3DModel": SequencePlan(
        _TWO_STREAMS,
        joint="rear",
        outputs={**_ROPE, "x_embedder": {0: 1}},
        gather=_OUT,
        refused={"image_condition_type": (None, "latent_concat")},
    ),
    "CogVideoXTransformer3DModel": SequencePlan(_SELF, inputs={"": {"image_rotary_emb": 0}, **_FIRST}, gather=_OUT),
    "HunyuanImageTransformer2DModel": SequencePlan(
        _TWO_STREAMS, joint="rear", outputs={**_ROPE, "x_embedder": {0: 1}}, gather=_OUT
    ),
    "CogView3PlusTransformer2DModel": SequencePlan(_SELF, inputs=_FIRST, gather=_OUT),
    "CogView4Transformer2DModel": SequencePlan(
        _SELF,
        outputs={**_ROPE, "patch_embed": {0: 1}},
        gather=_OUT,
        refused=dict.fromkeys(("attention_mask", "image_rotary_emb"), (None,)),
    ),
    **_alike(
        "BriaTransformer2DModel LongCatImageTransformer2DModel OvisImageTransformer2DModel",
        SequencePlan(_TWO_STREAMS, inputs={"": {"hidden_states": 1, "img_ids": -2}}, gather=_OUT),
    ),
    "SkyReelsV2Transformer3DModel": SequencePlan(
        ("blocks.*.attn1",),
        inputs={"blocks.0": {"hidden_states": 1}},
        outputs={"rope": {0: 1, 1: 1}},
        gather=_OUT,
        refused={"enable_diffusion_forcing": (False,)},
    ),
    "AuraFlowTransformer2DModel": SequencePlan(
        ("joint_transformer_blocks.*.attn", "single_transformer_blocks.*.attn"), outputs=_EMBEDDED, gather=_OUT
    ),
    "ChromaTransformer2DModel": SequencePlan(
        _TWO_STREAMS,
        inputs={"": {"hidden_states": 1, "img_ids": -2, **_CONTROL}},
        gather=_OUT,
        outer_mask="attention_mask",
    ),
    "ZImageTransformer2DModel": SequencePlan(
        (f"{_REFINED}.*.attention",),
        inputs={f"{_REFINED}.0": {"x": 1}, f"{_REFINED}.*": {"attn_mask": 1, "freqs_cis": 1}},
        gather={"noise_refiner.-1": 1, "all_final_layer.*": 1},
        refused=dict.fromkeys(("controlnet_block_samples", "siglip_feats", "image_noise_mask"), (None,)),
    ),
    "Lumina2Transformer2DModel": SequencePlan(
        (f"{_REFINED}.*.attn",),
        inputs={f"{_REFINED}.0": {"hidden_states": 1}, f"{_REFINED}.*": {"attention_mask": 1, "image_rotary_emb": 1}},
        gather={"noise_refiner.-1": 1, "norm_out": 1},
    ),
}
"""Sequence plans, by class. If the model has a ``_cp_plan``, its splits and gathers are added to these."""

ROWS = ("SanaTransformer2DModel",)
"""Transformers without a sequence plan that are divided by rows of pictures, as U-Nets are: convolutions between their
layers, and attention without a softmax, whose sums over tokens the ranks add up."""

_JOINT_BLOCKS = {
    "transformer_blocks.*.{attn,attn2}": "attention",
    "transformer_blocks.*.{ff,ff_context}": "feed_forward",
}
_SINGLE_BLOCKS = {
    "single_transformer_blocks.*.attn": "attention",
    "single_transformer_blocks.*.proj_mlp": "column",
    "single_transformer_blocks.*.proj_out": "attention_mlp_row",
}
_CROSS_BLOCKS = {"transformer_blocks.*.{attn1,attn2}": "attention", "transformer_blocks.*.ff": "feed_forward"}
_SELF_BLOCKS = {"transformer_blocks.*.attn1": "attention", "transformer_blocks.*.ff": "feed_forward"}
_WAN_BLOCKS = {"blocks.*.{attn1,attn2}": "attention", "blocks.*.ffn": "feed_forward"}
_ALL_REFINED = "{noise_refiner,context_refiner,layers}"

TENSOR: dict[str, dict[str, str]] = {
    "SD3Transformer2DModel": _JOINT_BLOCKS,
    **_alike(
        "HunyuanVideoTransformer3DModel HunyuanImageTransformer2DModel ChromaTransformer2DModel "
        "BriaTransformer2DModel LongCatImageTransformer2DModel",
        {**_JOINT_BLOCKS, **_SINGLE_BLOCKS},
    ),
    **_alike(
        "DiTTransformer2DModel PixArtTransformer2DModel CogVideoXTransformer3DModel AllegroTransformer3DModel",
        _CROSS_BLOCKS,
    ),
    **_alike("WanTransformer3DModel ChronoEditTransformer3DModel SkyReelsV2Transformer3DModel", _WAN_BLOCKS),
    **_alike("CogView3PlusTransformer2DModel CogView4Transformer2DModel ConsisIDTransformer3DModel", _SELF_BLOCKS),
    "LTXVideoTransformer3DModel": {**_CROSS_BLOCKS, "rope": "head_outputs"},
    "LatteTransformer3DModel": {
        "{transformer_blocks,temporal_transformer_blocks}.*.{attn1,attn2}": "attention",
        "{transformer_blocks,temporal_transformer_blocks}.*.ff": "feed_forward",
    },
    "HunyuanDiT2DModel": {"blocks.*.{attn1,attn2}": "attention", "blocks.*.ff": "feed_forward"},
    "ZImageTransformer2DModel": {
        f"{_ALL_REFINED}.*.attention": "attention",
        f"{_ALL_REFINED}.*.feed_forward.{{w1,w3}}": "column",
        f"{_ALL_REFINED}.*.feed_forward.w2": "row",
    },
    **_alike(
        "UNet2DConditionModel UNet3DConditionModel UNetMotionModel UNetSpatioTemporalConditionModel I2VGenXLUNet",
        {
            "**.{transformer_blocks,temporal_transformer_blocks}.*.{attn1,attn2}": "attention",
            "**.{transformer_blocks,temporal_transformer_blocks}.*.{ff,ff_in}": "feed_forward",
        },
    ),
    "AuraFlowTransformer2DModel": {
        "{joint,single}_transformer_blocks.*.attn": "attention",
        "{joint,single}_transformer_blocks.*.{ff,ff_context}.{linear_1,linear_2}": "column",
        "{joint,single}_transformer_blocks.*.{ff,ff_context}.out_projection": "row",
    },
}
"""Tensor plans, by class, for models without a ``_tp_plan``."""
