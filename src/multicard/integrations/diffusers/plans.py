"""The plans of one ``diffusers`` model: from our tables, and from the library's own ``_tp_plan`` and ``_cp_plan``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from multicard.errors import ConfigError, UnsupportedError
from multicard.integrations.diffusers.families import SEQUENCE, TENSOR, SequencePlan
from multicard.integrations.diffusers.styles import BLOCKS, STYLES
from multicard.integrations.plan import Rule, make_plan, resolve


@dataclasses.dataclass(frozen=True)
class TensorPlan:
    """The styles of one model's modules, and its attentions, by path."""

    styles: Mapping[str, str]
    attentions: tuple[str, ...]


def tensor_plan(model: nn.Module, plan: Mapping[str, str] | None = None) -> TensorPlan:
    """The styles of ``model``: from the caller's plan, the model's own ``_tp_plan``, or ours.

    Raises:
        ConfigError: the plan doesn't fit the model.
        UnsupportedError: there is no plan, a part of it is unknown, or ours names nothing that this model has.
    """
    name, own = type(model).__name__, getattr(model, "_tp_plan", None)
    ours = plan is None and not own
    if ours and name not in TENSOR:
        raise UnsupportedError(
            f"{name} has no tensor-parallel plan, of diffusers or ours; docs/diffusion.md lists the models that have. "
            "Use cfg or dp, or pass plan={'tensor': {pattern: style}}"
        )
    rules = make_plan(plan or (_translate(own) if own else TENSOR[name]), optional=ours)
    paths = [path for path, _ in model.named_modules() if path]
    found = resolve(rules, paths, {**BLOCKS, **STYLES}, name)
    if not found and ours:
        raise UnsupportedError(
            f"{name}: our tensor-parallel plan names {', '.join(TENSOR[name])}, and this model has none of them. "
            "Use cfg, dp, ring or ulysses, or pass plan={'tensor': {pattern: style}}"
        )
    if not found:
        raise ConfigError(f"the tensor plan of {name} matches none of its modules")
    styles: dict[str, str] = {}
    for path, style in found.items():
        parts = BLOCKS[style](model.get_submodule(path), path) if style in BLOCKS else {"": style}
        styles |= {f"{path}.{part}".strip("."): style for part, style in parts.items()}
    attentions = tuple(path for path, style in found.items() if style in ("attention", "attention_mlp"))
    return TensorPlan(styles, attentions)


def _translate(own: Mapping[str, Any]) -> dict[str, str]:
    """diffusers' plan in our styles. It names every linear layer; ours names whole attentions, for uneven heads."""
    plan = {}
    attentions = {path.rpartition(".")[0] for path in own if path.endswith((".to_q", ".to_qkv_mlp_proj"))}
    for path, style in own.items():
        owner = next((a for a in attentions if path.startswith(a + ".")), None)
        if owner is not None:
            plan[owner] = "attention_mlp" if f"{owner}.to_qkv_mlp_proj" in own else "attention"
        elif style in ("colwise", "rowwise"):
            plan[path] = {"colwise": "column", "rowwise": "row"}[style]
        elif type(style).__name__ == "PackedColwiseParallel" and style.blocks == [1, 1]:
            plan[path] = "gate_up"
        elif type(style).__name__ == "PackedRowwiseParallel" and style.blocks is None:
            plan[path] = "attention_mlp_row"
        else:
            raise UnsupportedError(f"_tp_plan: the style {style!r} of {path} isn't known here; pass plan=")
    return plan


def sequence_plan(model: nn.Module) -> SequencePlan:
    """Our plan for this class, with the model's own ``_cp_plan`` merged in.

    Raises:
        UnsupportedError: there is none.
    """
    name = type(model).__name__
    if name not in SEQUENCE:
        raise UnsupportedError(
            f"{name} has no sequence-parallel plan (ring, ulysses); docs/diffusion.md lists the {len(SEQUENCE)} models "
            "that have. Use cfg or dp, or pass plan={'sequence': SequencePlan(...)}"
        )
    return _merged(SEQUENCE[name], getattr(model, "_cp_plan", None) or {})


def _merged(plan: SequencePlan, own: Mapping[str, Any]) -> SequencePlan:
    inputs = {module: dict(dims) for module, dims in plan.inputs.items()}
    outputs = {module: dict(dims) for module, dims in plan.outputs.items()}
    gather = dict(plan.gather)
    for module, rule in own.items():
        if not isinstance(rule, Mapping):
            gather[module] = rule.gather_dim
            continue
        for key, entry in rule.items():
            if f"{module}.{key}" in plan.whole or key in plan.whole:
                continue
            if isinstance(key, int):
                outputs.setdefault(module, {})[key] = entry.split_dim
            else:
                inputs.setdefault(module, {})[key] = entry.split_dim
    return dataclasses.replace(plan, inputs=inputs, outputs=outputs, gather=gather)


def matching(model: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules by pattern; the items of a list may be counted from its end: ``layers.-1``."""
    rule = Rule(pattern, "")
    for path, module in model.named_modules():
        owner, _, number = path.rpartition(".")
        names = [path]
        if number.isdecimal():
            names.append(f"{owner}.{int(number) - len(list(model.get_submodule(owner).children()))}")
        if any(rule.matches(name) for name in names):
            yield path, module
