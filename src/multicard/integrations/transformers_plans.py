"""How each family of ``transformers`` models is split: our tables, and what the library's own ``tp_plan`` becomes.

Supporting one more family adds lines to ``FAMILIES``, never a class. What a style does is in ``transformers_layers``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import nn

from multicard.errors import UnsupportedError
from multicard.integrations.plan import Rule, make_plan, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STYLES = {
    "column": "output features by width",
    "row": "input features by width; the products are added up",
    "gate_up": "two fused projections, [gate | up], each by width",
    "query": "output features by query head",
    "key_value": "output features by the key/value heads that this rank's query heads read",
    "qkv": "fused [Q | K | V], each by its heads",
    "qkv_groups": "fused, for every key/value head [its query heads, K, V], by heads",
    "attention_out": "input features by query head; the products are added up",
    "heads": "a parameter with entries for every query head along its first dimension",
    "key_value_heads": "the same for every key/value head",
    "head_columns": "a table with a column for every query head (position biases)",
    "embedding": "vocabulary rows",
    "head": "vocabulary rows of the output, gathered",
    "experts": "packed mixture-of-experts weights, every expert by width; the outputs are added up",
    "whole": "on every rank",
}
FUSED = ("qkv", "qkv_groups")
HEAD_STYLES = ("query", "key_value", *FUSED, "attention_out", "heads", "key_value_heads", "head_columns")


@dataclasses.dataclass(frozen=True)
class Family:
    """What is particular to a family of models.

    Attributes:
        rules: style by pattern; they stand instead of the library's for what they match.
        optional: the same, for what only some checkpoints of the family have.
        head_inputs: arguments of the attention with a head dimension (position biases), cut to this rank's heads.
        query_widths: attributes of the attention that count its query features.
        kv_widths: the same for its key features.
        whole_groups: the attention can't share a key/value head between ranks unless there is only one.
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
_MLA = _rules(  # latent attention: the low-rank parts stay whole, what fans out to heads is split by them
    query="self_attn.{q_proj,q_b_proj,kv_b_proj}", attention_out="self_attn.o_proj"
)

FAMILIES: dict[str, Family] = {
    "bart": Family(_BART),
    "bert": Family(_BERT),
    "bert-generation": Family(_BERT),
    "biogpt": Family(_BART),
    "blenderbot": Family(_BART),
    "blenderbot-small": Family(_BART),
    "bloom": Family(_BLOOM, head_inputs=("alibi",), refuse={"slow_but_exact": "sums slices in an order of its own"}),
    "camembert": Family(_BERT),
    "clip": Family(_CLIP),
    "clip_text_model": Family(_CLIP),
    "clip_vision_model": Family(_CLIP),
    "cohere": Family(
        optional={
            "**.self_attn.q_norm.weight": "heads",
            "**.self_attn.k_norm.weight": "key_value_heads",
        }
    ),
    "data2vec-text": Family(_BERT),
    "deepseek_v2": Family(_MLA),
    "deepseek_v3": Family(_MLA),
    "electra": Family(_BERT),
    "ernie": Family(_BERT),
    "falcon": Family(_BLOOM, head_inputs=("alibi", "attention_mask"), whole_groups=True),
    "glm": Family(_GLM),
    "glm4": Family(_GLM),
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
    "marian": Family(_BART),
    "mbart": Family(_BART),
    "megatron-bert": Family(_BERT),
    "mpt": Family(
        _rules(qkv="attn.Wqkv", attention_out="attn.out_proj", column="ffn.up_proj", row="ffn.down_proj"),
        head_inputs=("position_bias",),
    ),
    "mt5": Family(_T5, query_widths=("inner_dim",)),
    "mvp": Family(_BART, query_widths=("embed_dim",)),
    "opt": Family(_rules(**_NAMES, attention_out="self_attn.out_proj", column="fc1", row="fc2")),
    "pegasus": Family(_BART),
    "persimmon": Family(
        _rules(
            qkv_groups="self_attn.query_key_value",
            attention_out="self_attn.dense",
            column="mlp.dense_h_to_4h",
            row="mlp.dense_4h_to_h",
        )
    ),
    "phi3": Family(_PHI3),
    "plbart": Family(_BART),
    "rembert": Family(_BERT),
    "roberta": Family(_BERT),
    "roberta-prelayernorm": Family(_BERT),
    "siglip": Family(_CLIP),
    "siglip_text_model": Family(_CLIP),
    "siglip_vision_model": Family(_CLIP),
    "stablelm": Family(_LLAMA),
    "t5": Family(_T5, query_widths=("inner_dim",)),
    "umt5": Family(_T5, query_widths=("inner_dim",)),
    "vit": Family(
        _rules(
            query="attention.q_proj",
            key_value="attention.{k_proj,v_proj}",
            attention_out="attention.o_proj",
            column="mlp.fc1",
            row="mlp.fc2",
        )
    ),
    "whisper": Family(_BART),
    "xlm-roberta": Family(_BERT),
    "xlm-roberta-xl": Family(_BERT),
}


@dataclasses.dataclass(frozen=True)
class ResolvedPlan:
    """The styles of one model's modules and parameters, by path, and the family of each."""

    styles: Mapping[str, str]
    families: Mapping[str, Family]

    def family(self, path: str) -> Family:
        """The family of the innermost model of ours to know that holds ``path``."""
        holders = [root for root in self.families if not root or path == root or path.startswith(root + ".")]
        return self.families[max(holders, key=len)] if holders else Family()


def resolve_plan(model: PreTrainedModel, plan: Mapping[str, str] | None = None) -> ResolvedPlan:
    """The styles that ``model`` is split by: the caller's plan, or ours over the one that transformers ships.

    Raises:
        ConfigError: a rule of ours or the caller's that matches nothing, or two that match one module.
        UnsupportedError: no plan for this family, or a setting of its config that can't be split.
    """
    what = f"{type(model).__name__} (model_type={model.config.model_type!r})"
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    names += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    families = dict(_families(model))
    styles: dict[str, str] = {}
    if plan is not None:
        styles = resolve(make_plan(plan), names, STYLES, what)
    else:
        styles = _shipped(model, names, what)
        for root, family in families.items():
            _refuse_settings(model.get_submodule(root), family)
            below = {name.removeprefix(f"{root}.") if root else name: name for name in names if _within(name, root)}
            rules = (*make_plan(family.rules), *make_plan(family.optional, optional=True))
            styles |= {below[name]: style for name, style in resolve(rules, below, STYLES, what).items()}
    if not any(style not in ("whole", "embedding", "head") for style in styles.values()):
        raise UnsupportedError(
            f"{what} has no tensor-parallel plan, neither in transformers nor in multicard: "
            f"pass plan={{pattern: style}}, styles being {', '.join(STYLES)}"
        )
    return ResolvedPlan(styles, families)


def _within(name: str, root: str) -> bool:
    return not root or name.startswith(f"{root}.")


def _families(model: PreTrainedModel) -> Iterator[tuple[str, Family]]:
    """Roots of the models inside ``model`` that our table knows, outermost first (a pipeline's towers differ)."""
    from transformers import PreTrainedModel

    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel):
            continue
        kind = module.config.model_type
        above = [
            root for root, other in found.items() if _within(name, root) and FAMILIES.get(other) is FAMILIES.get(kind)
        ]
        if kind in FAMILIES and not above:
            found[name] = kind
            yield name, FAMILIES[kind]


def _refuse_settings(model: nn.Module, family: Family) -> None:
    for setting, why in family.refuse.items():
        if getattr(getattr(model, "config", None), setting, False):
            raise UnsupportedError(
                f"{type(model).__name__} with {setting}=True: {why}; load it with {setting}=False or on one rank"
            )


IGNORED = ("replicated_with_grad_allreduce", "mla_kv_a_proj", "local_params", "replicate", "keep_full_weight")
GATHERED = ("colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep", "embedding_colwise")


def _shipped(model: PreTrainedModel, names: list[str], what: str) -> dict[str, str]:
    """transformers' own plan in our styles; what it would only gather again stays whole."""
    theirs = dict(model.tp_plan or {})
    known = {*IGNORED, *GATHERED, "colwise", "rowwise", "embedding_rowwise", "moe_tp_experts", "packed_colwise"}
    for pattern, style in theirs.items():
        if style not in known:
            raise UnsupportedError(
                f"{what}: transformers' plan splits {pattern!r} by {style!r}, which multicard doesn't know: pass plan="
            )
    rules = [Rule(pattern, style, optional=True) for pattern, style in theirs.items()]
    found = resolve(tuple(rules), names, known, what)
    experts = [name for name, style in found.items() if style == "moe_tp_experts"]
    attention = {name.rpartition(".")[0] for name, style in found.items() if _is_key(name) and style == "colwise"}
    styles = {}
    for name, style in found.items():
        if any(name.startswith(f"{expert}.") for expert in experts):
            continue
        styles[name] = _translate(name, style, name.rpartition(".")[0] in attention)
    return styles


def _is_key(name: str) -> bool:
    return re.fullmatch(r"k_proj|kv_b_proj|qkv_proj|query_key_value", name.rpartition(".")[2]) is not None


def _translate(name: str, style: str, in_attention: bool) -> str:
    leaf = name.rpartition(".")[2]
    if style == "moe_tp_experts":
        return "experts"
    if style == "colwise" and in_attention:
        if leaf in ("k_proj", "v_proj"):
            return "key_value"
        if leaf in ("qkv_proj", "query_key_value"):
            return "qkv"
        return "heads" if leaf in ("sinks", "gate_bias") else "query"
    if style == "rowwise" and in_attention:
        return "attention_out"
    return {"colwise": "column", "rowwise": "row"}.get(style, "whole")
