"""The plan of one ``transformers`` model: our table's rules and, in our styles, the library's own ``tp_plan``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import nn

from multicard.errors import UnsupportedError
from multicard.integrations.plan import make_plan, resolve
from multicard.integrations.transformers.families import FAMILIES, Family
from multicard.integrations.transformers.styles import STYLES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


TO_QUERY = ("query", "qkv", "qkv_groups")


@dataclasses.dataclass(frozen=True)
class ResolvedPlan:
    """The styles of one model's modules and parameters, by path, and the family of each."""

    styles: Mapping[str, str]
    families: Mapping[str, Family]

    @property
    def attentions(self) -> list[str]:
        """Paths of the attention modules that are split: those with a projection to query heads."""
        return sorted({path.rpartition(".")[0] for path, style in self.styles.items() if style in TO_QUERY})

    def family(self, path: str) -> Family:
        """The family of the innermost model around ``path`` that the table knows."""
        holders = [root for root in self.families if not root or path == root or path.startswith(root + ".")]
        return self.families[max(holders, key=len)] if holders else Family()


def resolve_plan(model: PreTrainedModel, plan: Mapping[str, str] | None = None) -> ResolvedPlan:
    """The styles of ``model``: from the caller's plan, or from transformers' plan with our rules in place of its own.

    Raises:
        ConfigError: a rule matches nothing, or two match one module.
        UnsupportedError: no plan for this family, or a setting of its config that can't be split.
    """
    what = f"{type(model).__name__} (model_type={model.config.model_type!r})"
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    names += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    families = dict(_families(model))
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
            f"pass plan={{pattern: style}} with the styles {', '.join(STYLES)}"
        )
    return ResolvedPlan(styles, families)


def _within(name: str, root: str) -> bool:
    return not root or name.startswith(f"{root}.")


def _families(model: PreTrainedModel) -> Iterator[tuple[str, Family]]:
    """The models inside ``model`` that our table knows, outermost first (a multimodal model's towers differ)."""
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
    """transformers' own plan in our styles; modules whose output it would only gather stay whole."""
    theirs = dict(model.tp_plan or {})
    known = {*IGNORED, *GATHERED, "colwise", "rowwise", "embedding_rowwise"}
    known |= {"moe_tp_experts", "packed_colwise", "packed_rowwise"}
    for pattern, style in theirs.items():
        if style not in known:
            raise UnsupportedError(
                f"{what}: transformers' plan splits {pattern!r} by {style!r}, which multicard doesn't know: pass plan="
            )
    found = resolve(make_plan(theirs, optional=True), names, known, what)
    experts = tuple(f"{name}." for name, style in found.items() if style == "moe_tp_experts")
    attention = {name.rpartition(".")[0] for name, style in found.items() if _is_key(name) and style == "colwise"}
    return {
        name: _translate(name, style, name.rpartition(".")[0] in attention)
        for name, style in found.items()
        if not name.startswith(experts)
    }


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
