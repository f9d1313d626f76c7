"""Checks of callers' values: whole numbers within limits, and suggestions for misspelt names."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable
from typing import Any

from multicard.errors import ConfigError

LONGEST = 1 << 24
"""Characters of a prompt: a hundred times what the longest contexts hold."""


def is_whole(value: Any, least: int | None = None, most: int | None = None) -> bool:
    """Whether ``value`` is a whole number, not a bool, from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return False
    return (least is None or int(value) >= least) and (most is None or int(value) <= most)


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """``; did you mean 'ulysses'?`` as the end of an error; empty if nothing in ``known`` is similar."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_text(text: str) -> None:
    """Refuse a prompt that no tokenizer takes.

    Raises:
        ConfigError: it is too long, or not Unicode (a lone surrogate, which invalid UTF-8 on a command line becomes).
    """
    if len(text) > LONGEST:
        raise ConfigError(f"a prompt of {len(text)} characters: {LONGEST} at most")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the prompt isn't Unicode: character {error.start} is the lone surrogate {text[error.start]!a}; text on a "
            "command line has to be UTF-8"
        ) from None
