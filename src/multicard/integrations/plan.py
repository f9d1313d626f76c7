"""A plan: which style splits which module of a model. Data only; the adapters define what each style does."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

from multicard.errors import ConfigError
from multicard.values import did_you_mean


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a plan.

    Attributes:
        pattern: matches modules (or parameters) by dotted path from the model: ``*`` any characters within one part,
            ``**`` any number of parts, ``{a,b}`` either.
        style: how they are split: one of the adapter's styles.
        optional: may match nothing, as in a library's plans that serve several configurations of a family.
    """

    pattern: str
    style: str
    optional: bool = False

    def matches(self, name: str) -> bool:
        return _compile(self.pattern).fullmatch(name) is not None


Plan = tuple[Rule, ...]


def make_plan(rules: Mapping[str, str], *, optional: bool = False) -> Plan:
    """A plan from ``{pattern: style}``."""
    return tuple(Rule(pattern, style, optional) for pattern, style in rules.items())


def resolve(plan: Plan, names: Iterable[str], styles: Iterable[str], model: str = "this model") -> dict[str, str]:
    """``{name: style}`` for every name that a rule matches, in the names' order.

    Args:
        plan: the rules.
        names: dotted paths of modules and parameters that can be split.
        styles: the adapter's styles.
        model: the model's name, for errors.

    Raises:
        ConfigError: an unknown style, a rule that matches nothing and isn't optional, or two rules for one name.
    """
    names, styles = list(names), list(styles)
    for rule in plan:
        if rule.style not in styles:
            raise ConfigError(
                f"plan: unknown style {rule.style!r} for {rule.pattern!r}: must be one of {', '.join(styles)}"
                f"{did_you_mean(rule.style, styles)}"
            )
    found: dict[str, Rule] = {}
    used: set[Rule] = set()
    for name in names:
        for rule in (rule for rule in plan if rule.matches(name)):
            if name in found:
                raise ConfigError(
                    f"plan: {name!r} of {model} matches two rules, {found[name].pattern!r} and {rule.pattern!r}: "
                    "make one of them narrower"
                )
            found[name] = rule
            used.add(rule)
    for rule in plan:
        if rule not in used and not rule.optional:
            hint = did_you_mean(rule.pattern, names, cutoff=0.3)
            raise ConfigError(f"plan: {rule.pattern!r} matches nothing in {model}{hint}")
    return {name: rule.style for name, rule in found.items()}


def _compile(pattern: str) -> re.Pattern[str]:
    out = []
    for token in re.split(r"(\*\*|\*|\{[^{}]*\})", pattern):
        if token == "**":
            out.append(r".+")
        elif token == "*":
            out.append(r"[^.]+")
        elif token.startswith("{") and token.endswith("}"):
            out.append("(?:" + "|".join(re.escape(part) for part in token[1:-1].split(",")) + ")")
        else:
            out.append(re.escape(token))
    return re.compile("".join(out))
