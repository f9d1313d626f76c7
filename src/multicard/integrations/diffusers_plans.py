# ruff: noqa: SIM905  lists of names are easier to read and to compare as words
"""What multicard knows of diffusers' models beyond what they say themselves. Data only."""

from __future__ import annotations

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
    text_hidden_states negative_mask
""".split()

_ITEMS = "x cap_feats siglip_feats image_noise_mask img_shapes txt_seq_lens shape_list input_img_latents img_sizes"

BATCH = BatchPlan(
    sample=("hidden_states", "sample", "x", "latents"),
    dims={**dict.fromkeys([*_DIM_0, "x"], 0), "encoder_hidden_states_llama3": 1},
    items=frozenset(_ITEMS.split()),
)
"""Which arguments of diffusers' denoisers carry the batch. Rotary embeddings, token ids of positions, layer numbers and
scales don't; what is missing here only makes a call unsplittable, since every split is tried against the whole."""
