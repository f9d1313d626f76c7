"""Which modules a checkpoint has packed: rules over their names, in order."""

from __future__ import annotations

import dataclasses
import re

from multicard.errors import UnsupportedError
from multicard.weights.schemes.method import Method

LONGEST_PATTERN = 300  # characters
MOST_REPEATS = 4
REPEATED_GROUP = re.compile(r"(?<!\\)\)[*+?{]")


class Rule:
    """Modules whose names match have this method; None: they aren't packed."""

    def __init__(self, pattern: str, method: Method | None) -> None:
        self.pattern, self.method = pattern, method
        self._compiled = checked(pattern)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rule) and (self.pattern, self.method) == (other.pattern, other.method)

    def __hash__(self) -> int:
        return hash((self.pattern, self.method))

    def matches(self, module: str) -> bool:
        return self._compiled.match(module) is not None


@dataclasses.dataclass(frozen=True)
class Scheme:
    """What a ``quantization_config`` says.

    Attributes:
        name: its ``quant_method``.
        rules: the first that matches a linear module's name counts; without any it isn't packed.
    """

    name: str
    rules: tuple[Rule, ...]

    def method_of(self, module: str) -> Method | None:
        """How a linear module of this name is packed; None: it isn't."""
        return next((rule.method for rule in self.rules if rule.matches(module)), None)

    @property
    def block(self) -> int:
        """Columns that are best kept together: the largest group."""
        return max((rule.method.group or 1 for rule in self.rules if rule.method is not None), default=1)


def checked(pattern: str) -> re.Pattern[str]:
    """A config's regular expression, if matching a name with it can't take long.

    Raises:
        UnsupportedError: it isn't one, or it is long, repeats a group, or repeats often.
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        raise UnsupportedError(f"the pattern {pattern[:LONGEST_PATTERN]!r} isn't a regular expression") from None
    repeats = len(re.findall(r"[*+{]", pattern))
    if len(pattern) > LONGEST_PATTERN or repeats > MOST_REPEATS or REPEATED_GROUP.search(pattern):
        raise UnsupportedError(
            f"the pattern {pattern[:LONGEST_PATTERN]!r}: patterns have at most {LONGEST_PATTERN} characters and "
            f"{MOST_REPEATS} repetitions, of no groups: name the modules instead"
        )
    return compiled


def exactly(name: str) -> str:
    """A pattern for this name alone."""
    return rf"{re.escape(name)}\Z"
