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


def _rules(styles: str, patterns: str) -> dict[str, str]:
    """The style of what each pattern matches at any depth; both in words, in the same order."""
    return {f"**.{pattern}": style for style, pattern in zip(styles.split(), patterns.split(), strict=True)}


def _alike(kinds: str, family: Family) -> dict[str, Family]:
    return dict.fromkeys(kinds.split(), family)


_SEPARATE = "query key_value attention_out column row"
_BIASED = "query key_value attention_out column row head_columns"
_FUSED = "qkv attention_out column row"
_GROUPED = "qkv_groups attention_out column row"
_GATED = "qkv attention_out gate_up row"

_NAMES = "self_attn.q_proj self_attn.{k_proj,v_proj}"
_LLAMA = _rules(_SEPARATE, f"{_NAMES} self_attn.o_proj mlp.{{gate_proj,up_proj}} mlp.down_proj")
_CLIP = _rules(_SEPARATE, f"{_NAMES} self_attn.out_proj mlp.fc1 mlp.fc2")
_BART = _rules(
    _SEPARATE,
    "{self_attn,encoder_attn}.q_proj {self_attn,encoder_attn}.{k_proj,v_proj} {self_attn,encoder_attn}.out_proj "
    "fc1 fc2",
)
_BERT = _rules(
    _SEPARATE,
    "attention.self.query attention.self.{key,value} attention.output.dense "
    "layer.*.intermediate.dense layer.*.output.dense",
)
_GLM = _rules("gate_up row", "mlp.gate_up_proj mlp.down_proj")
_GPT2 = "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"
_GPT_NEOX = _rules(_GROUPED, "attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h")
_BLOOM = _rules(_GROUPED, "self_attention.query_key_value self_attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h")
_T5 = _rules(
    _BIASED,
    "{SelfAttention,EncDecAttention}.q {SelfAttention,EncDecAttention}.{k,v} {SelfAttention,EncDecAttention}.o "
    "DenseReluDense.{wi,wi_0,wi_1} DenseReluDense.wo relative_attention_bias",
)
_VIT = _rules(_SEPARATE, "attention.q_proj attention.{k_proj,v_proj} attention.o_proj mlp.fc1 mlp.fc2")
_OLD_VIT = _rules(
    _SEPARATE,
    "attention.attention.query attention.attention.{key,value} attention.output.dense "
    "layer.*.intermediate.dense layer.*.output.dense",
)
_WAV2VEC2 = _rules(
    _SEPARATE,
    "attention.q_proj attention.{k_proj,v_proj} attention.out_proj "
    "feed_forward.intermediate_dense feed_forward.output_dense",
)
_MLA = _rules(  # latent attention: the low-rank parts stay whole, what fans out to heads is split by them
    "query attention_out", "self_attn.{q_proj,q_b_proj,kv_b_proj} self_attn.o_proj"
)
_OTHER_CROSS_ATTENTION = {"add_cross_attention": "its cross-attention has another layout"}


FAMILIES: dict[str, Family] = {
    **_alike(
        "bart biogpt blenderbot blenderbot-small m2m_100 marian mbart pegasus plbart speech_to_text whisper",
        Family(_BART),
    ),
    **_alike(
        "bert bert-generation camembert data2vec-text dpr electra ernie esm layoutlm markuplm megatron-bert rembert "
        "roberta roberta-prelayernorm roc_bert roformer splinter tapas visual_bert xlm-roberta xlm-roberta-xl xmod",
        Family(_BERT),
    ),
    **_alike("clip clip_text_model clip_vision_model siglip siglip_text_model siglip_vision_model", Family(_CLIP)),
    **_alike("glm glm4", Family(_GLM)),
    **_alike("mvp xglm", Family(_BART, query_widths=("embed_dim",))),
    **_alike("qwen3_vl_text stablelm", Family(_LLAMA)),
    **_alike("deepseek_v2 deepseek_v3", Family(_MLA)),
    **_alike("audio-spectrogram-transformer data2vec-vision dpt videomae yolos", Family(_OLD_VIT)),
    **_alike("mt5 t5 umt5", Family(_T5, query_widths=("inner_dim",))),
    **_alike("beit deit dinov2 dinov2_with_registers ijepa vit vit_mae vit_msn vivit", Family(_VIT)),
    **_alike("data2vec-audio hubert sew unispeech wav2vec2", Family(_WAV2VEC2)),
    "albert": Family(
        _rules(
            f"{_SEPARATE} whole",
            "attention.query attention.{key,value} attention.dense ffn ffn_output attention.LayerNorm.{weight,bias}",
        ),
        query_widths=("all_head_size",),
    ),
    "bloom": Family(_BLOOM, head_inputs=("alibi",), refuse={"slow_but_exact": "sums slices in an order of its own"}),
    "cohere": Family(optional=_rules("heads key_value_heads", "self_attn.q_norm.weight self_attn.k_norm.weight")),
    "dinov3_vit": Family(
        _rules(
            _SEPARATE,
            "attention.q_proj attention.{k_proj,v_proj} attention.o_proj mlp.{gate_proj,up_proj} mlp.down_proj",
        )
    ),
    "distilbert": Family(
        _rules(_SEPARATE, "attention.q_lin attention.{k_lin,v_lin} attention.out_lin ffn.lin1 ffn.lin2")
    ),
    "falcon": Family(_BLOOM, head_inputs=("alibi", "attention_mask"), whole_groups=True),
    "gpt2": Family(_rules(_FUSED, _GPT2), query_widths=("split_size",), refuse=_OTHER_CROSS_ATTENTION),
    "gpt_bigcode": Family(
        _rules(_GROUPED, _GPT2),
        query_widths=("embed_dim", "split_size"),
        kv_widths=("kv_dim",),
        refuse=_OTHER_CROSS_ATTENTION,
    ),
    "gpt_neo": Family(
        _rules(_SEPARATE, "attention.q_proj attention.{k_proj,v_proj} attention.out_proj mlp.c_fc mlp.c_proj")
    ),
    "gpt_neox": Family(_GPT_NEOX),
    "gpt_neox_japanese": Family(_GPT_NEOX, optional={"**.attention.dense_bias": "whole"}),
    "gpt_oss": Family(
        _rules(
            "query key_value attention_out heads experts",
            f"{_NAMES} self_attn.o_proj self_attn.sinks mlp.experts",
        )
    ),
    "gptj": Family(_rules(_SEPARATE, "attn.q_proj attn.{k_proj,v_proj} attn.out_proj mlp.fc_in mlp.fc_out")),
    "lfm2": Family(_rules(_SEPARATE, f"{_NAMES} self_attn.out_proj feed_forward.{{w1,w3}} feed_forward.w2")),
    "mllama_text_model": Family(
        _rules(
            _SEPARATE,
            "{self_attn,cross_attn}.q_proj {self_attn,cross_attn}.{k_proj,v_proj} {self_attn,cross_attn}.o_proj "
            "mlp.{gate_proj,up_proj} mlp.down_proj",
        )
    ),
    "modernbert": Family(_rules(_GATED, "attn.Wqkv attn.Wo mlp.Wi mlp.Wo")),
    "mpnet": Family(
        _rules(
            _BIASED,
            "attention.attn.q attention.attn.{k,v} attention.attn.o "
            "layer.*.intermediate.dense layer.*.output.dense relative_attention_bias",
        )
    ),
    "mpt": Family(_rules(_FUSED, "attn.Wqkv attn.out_proj ffn.up_proj ffn.down_proj"), head_inputs=("position_bias",)),
    "openai-gpt": Family(_rules(_FUSED, _GPT2), query_widths=("split_size",)),
    "opt": Family(_rules(_SEPARATE, f"{_NAMES} self_attn.out_proj fc1 fc2")),
    "persimmon": Family(
        _rules(_GROUPED, "self_attn.query_key_value self_attn.dense mlp.dense_h_to_4h mlp.dense_4h_to_h")
    ),
    "phi3": Family(_rules(_GATED, "self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj")),
    "pixtral": Family(
        _rules(
            _SEPARATE,
            "attention.q_proj attention.{k_proj,v_proj} attention.o_proj "
            "feed_forward.{gate_proj,up_proj} feed_forward.down_proj",
        )
    ),
}
