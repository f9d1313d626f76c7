"""How each family of ``transformers`` models is split: a table.

Supporting one more family adds lines to ``FAMILIES``, never a class. What a style does is in ``styles``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Family:
    """How one family of models is split.

    Attributes:
        rules: style by pattern; they replace the library's rules for the modules that they match.
        optional: the same, for modules that only some checkpoints of the family have.
        head_inputs: arguments of the attention with a head dimension (position biases), sliced to this rank's heads.
        query_widths: attributes of the attention that hold the number of its query features.
        kv_widths: the same for its key features.
        whole_groups: a key/value head can't be shared between ranks unless there is only one.
        refuse: settings of the config that can't be split, and why.
    """

    rules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    optional: Mapping[str, str] = dataclasses.field(default_factory=dict)
    head_inputs: tuple[str, ...] = ()
    query_widths: tuple[str, ...] = ()
    kv_widths: tuple[str, ...] = ()
    whole_groups: bool = False
    refuse: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _rules(**patterns: str) -> dict[str, str]:
    return {f"**.{pattern}": style for style, pattern in patterns.items()}


_NAMES = {"query": "self_attn.q_proj", "key_value": "self_attn.{k_proj,v_proj}"}
_LLAMA = _rules(**_NAMES, attention_out="self_attn.o_proj", column="mlp.{gate_proj,up_proj}", row="mlp.down_proj")
_CLIP = _rules(**_NAMES, attention_out="self_attn.out_proj", column="mlp.fc1", row="mlp.fc2")
_BART = _rules(
    query="{self_attn,encoder_attn}.q_proj",
    key_value="{self_attn,encoder_attn}.{k_proj,v_proj}",
    attention_out="{self_attn,encoder_attn}.out_proj",
    column="fc1",
    row="fc2",
)
_BERT = _rules(
    query="attention.self.query",
    key_value="attention.self.{key,value}",
    attention_out="attention.output.dense",
    column="layer.*.intermediate.dense",
    row="layer.*.output.dense",
)
_GLM = _rules(gate_up="mlp.gate_up_proj", row="mlp.down_proj")
_PHI3 = _rules(
    qkv="self_attn.qkv_proj", attention_out="self_attn.o_proj", gate_up="mlp.gate_up_proj", row="mlp.down_proj"
)
_GPT_NEOX = _rules(
    qkv_groups="attention.query_key_value",
    attention_out="attention.dense",
    column="mlp.dense_h_to_4h",
    row="mlp.dense_4h_to_h",
)
_BLOOM = _rules(
    qkv_groups="self_attention.query_key_value",
    attention_out="self_attention.dense",
    column="mlp.dense_h_to_4h",
    row="mlp.dense_4h_to_h",
)
_T5 = _rules(
    query="{SelfAttention,EncDecAttention}.q",
    key_value="{SelfAttention,EncDecAttention}.{k,v}",
    attention_out="{SelfAttention,EncDecAttention}.o",
    head_columns="relative_attention_bias",
    column="DenseReluDense.{wi,wi_0,wi_1}",
    row="DenseReluDense.wo",
)
_VIT = _rules(
    query="attention.q_proj",
    key_value="attention.{k_proj,v_proj}",
    attention_out="attention.o_proj",
    column="mlp.fc1",
    row="mlp.fc2",
)
_OLD_VIT = _rules(
    query="attention.attention.query",
    key_value="attention.attention.{key,value}",
    attention_out="attention.output.dense",
    column="layer.*.intermediate.dense",
    row="layer.*.output.dense",
)
_WAV2VEC2 = _rules(
    query="attention.q_proj",
    key_value="attention.{k_proj,v_proj}",
    attention_out="attention.out_proj",
    column="feed_forward.intermediate_dense",
    row="feed_forward.output_dense",
)
_MLA = _rules(  # latent attention: the low-rank parts stay whole, projections from them to heads are split by heads
    query="self_attn.{q_proj,q_b_proj,kv_b_proj}", attention_out="self_attn.o_proj"
)


def _alike(family: Family, *kinds: str) -> dict[str, Family]:
    return dict.fromkeys(kinds, family)


FAMILIES: dict[str, Family] = {
    **_alike(
        Family(_BART),
        "bart",
        "biogpt",
        "blenderbot",
        "blenderbot-small",
        "m2m_100",
        "marian",
        "mbart",
        "pegasus",
        "plbart",
        "speech_to_text",
        "whisper",
    ),
    **_alike(
        Family(_BERT),
        "bert",
        "bert-generation",
        "camembert",
        "data2vec-text",
        "dpr",
        "electra",
        "ernie",
        "esm",
        "layoutlm",
        "markuplm",
        "megatron-bert",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "splinter",
        "tapas",
        "visual_bert",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    ),
    **_alike(
        Family(_CLIP),
        "clip",
        "clip_text_model",
        "clip_vision_model",
        "siglip",
        "siglip_text_model",
        "siglip_vision_model",
    ),
    **_alike(Family(_GLM), "glm", "glm4"),
    **_alike(Family(_LLAMA), "qwen3_vl_text", "stablelm"),
    **_alike(Family(_MLA), "deepseek_v2", "deepseek_v3"),
    **_alike(Family(_OLD_VIT), "audio-spectrogram-transformer", "data2vec-vision", "dpt", "videomae", "yolos"),
    **_alike(Family(_T5, query_widths=("inner_dim",)), "mt5", "t5", "umt5"),
    **_alike(
        Family(_VIT), "beit", "deit", "dinov2", "dinov2_with_registers", "ijepa", "vit", "vit_mae", "vit_msn", "vivit"
    ),
    **_alike(Family(_WAV2VEC2), "data2vec-audio", "hubert", "sew", "unispeech", "wav2vec2"),
    "albert": Family(
        _rules(
            query="attention.query",
            key_value="attention.{key,value}",
            attention_out="attention.dense",
            column="ffn",
            row="ffn_output",
            whole="attention.LayerNorm.{weight,bias}",
        ),
        query_widths=("all_head_size",),
    ),
    "bloom": Family(_BLOOM, head_inputs=("alibi",), refuse={"slow_but_exact": "it sums slices in its own order"}),
    "cohere": Family(
        optional={
            "**.self_attn.q_norm.weight": "heads",
            "**.self_attn.k_norm.weight": "key_value_heads",
        }
    ),
    "dinov3_vit": Family(
        _rules(
            query="attention.q_proj",
            key_value="attention.{k_proj,v_proj}",
            attention_out="attention.o_proj",
            column="mlp.{gate_proj,up_proj}",
            row="mlp.down_proj",
        )
    ),
    "distilbert": Family(
        _rules(
            query="attention.q_lin",
            key_value="attention.{k_lin,v_lin}",
            attention_out="attention.out_lin",
            column="ffn.lin1",
            row="ffn.lin2",
        )
    ),
    "falcon": Family(_BLOOM, head_inputs=("alibi", "attention_mask"), whole_groups=True),
    "gpt2": Family(
        _rules(qkv="attn.c_attn", attention_out="attn.c_proj", column="mlp.c_fc", row="mlp.c_proj"),
        query_widths=("split_size",),
        refuse={"add_cross_attention": "its cross-attention has another layout"},
    ),
    "gpt_bigcode": Family(
        _rules(qkv_groups="attn.c_attn", attention_out="attn.c_proj", column="mlp.c_fc", row="mlp.c_proj"),
        query_widths=("embed_dim", "split_size"),
        kv_widths=("kv_dim",),
        refuse={"add_cross_attention": "its cross-attention has another layout"},
    ),
    "gpt_neo": Family(
        _rules(
            query="attention.q_proj",
            key_value="attention.{k_proj,v_proj}",
            attention_out="attention.out_proj",
            column="mlp.c_fc",
            row="mlp.c_proj",
        )
    ),
    "gpt_neox": Family(_GPT_NEOX),
    "gpt_neox_japanese": Family(_GPT_NEOX, optional={"**.attention.dense_bias": "whole"}),
    "gpt_oss": Family(
        _rules(**_NAMES, attention_out="self_attn.o_proj", heads="self_attn.sinks", experts="mlp.experts")
    ),
    "gptj": Family(
        _rules(
            query="attn.q_proj",
            key_value="attn.{k_proj,v_proj}",
            attention_out="attn.out_proj",
            column="mlp.fc_in",
            row="mlp.fc_out",
        )
    ),
    "lfm2": Family(
        _rules(**_NAMES, attention_out="self_attn.out_proj", column="feed_forward.{w1,w3}", row="feed_forward.w2")
    ),
    "mllama_text_model": Family(
        _rules(
            query="{self_attn,cross_attn}.q_proj",
            key_value="{self_attn,cross_attn}.{k_proj,v_proj}",
            attention_out="{self_attn,cross_attn}.o_proj",
            column="mlp.{gate_proj,up_proj}",
            row="mlp.down_proj",
        )
    ),
    "modernbert": Family(_rules(qkv="attn.Wqkv", attention_out="attn.Wo", gate_up="mlp.Wi", row="mlp.Wo")),
    "mpnet": Family(
        _rules(
            query="attention.attn.q",
            key_value="attention.attn.{k,v}",
            attention_out="attention.attn.o",
            head_columns="relative_attention_bias",
            column="layer.*.intermediate.dense",
            row="layer.*.output.dense",
        )
    ),
    "mpt": Family(
        _rules(qkv="attn.Wqkv", attention_out="attn.out_proj", column="ffn.up_proj", row="ffn.down_proj"),
        head_inputs=("position_bias",),
    ),
    "mvp": Family(_BART, query_widths=("embed_dim",)),
    "openai-gpt": Family(
        _rules(qkv="attn.c_attn", attention_out="attn.c_proj", column="mlp.c_fc", row="mlp.c_proj"),
        query_widths=("split_size",),
    ),
    "opt": Family(_rules(**_NAMES, attention_out="self_attn.out_proj", column="fc1", row="fc2")),
    "persimmon": Family(
        _rules(
            qkv_groups="self_attn.query_key_value",
            attention_out="self_attn.dense",
            column="mlp.dense_h_to_4h",
            row="mlp.dense_4h_to_h",
        )
    ),
    "phi3": Family(_PHI3),
    "pixtral": Family(
        _rules(
            query="attention.q_proj",
            key_value="attention.{k_proj,v_proj}",
            attention_out="attention.o_proj",
            column="feed_forward.{gate_proj,up_proj}",
            row="feed_forward.down_proj",
        )
    ),
    "xglm": Family(_BART, query_widths=("embed_dim",)),
}
