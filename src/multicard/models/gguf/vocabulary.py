"""The tokens of a GGUF file, checked: texts, kinds, scores, merges, and which ids are special."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from multicard.errors import CheckpointError, UnsupportedError
from multicard.values import is_whole

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens: CONTROL ones are left out of text, USER_DEFINED ones are matched as a whole before anything else."""

KINDS = ("gpt2", "llama")
PREFIX = "tokenizer.ggml."
ID = "token_id"
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""How a chat template calls a special token, and how a file does."""
LLAMA_IDS = {"bos": 1, "eos": 2, "unknown": 0}
"""Of SentencePiece's files, where they say nothing else."""

ENDS = ("eos", "eot", "eom")
END_TEXTS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
"""Control tokens that end an answer whether or not a file says so: of several, it can only name one of each kind."""

USED = (
    "model",
    "pre",
    "tokens",
    "token_type",
    "scores",
    "merges",
    "add_bos_token",
    "add_eos_token",
    "add_space_prefix",
)
UNNEEDED = ("token_type_count",)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What a file says about its tokens.

    Attributes:
        kind: "gpt2" (byte-level BPE with merges) or "llama" (SentencePiece's BPE with scores).
        pre: the name of the rule by which text is cut before it is merged; None: there is none.
        special: ids by role: those of SPECIAL and ENDS that there are.
        adds: whether the file asks for a token at the "bos" or "eos", or for a "space", in front; None: it doesn't say.
    """

    kind: str
    pre: str | None
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[tuple[str, str]]
    special: dict[str, int]
    adds: dict[str, bool | None]

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids that end an answer, the file's own end token first."""
        named = [self.special[role] for role in ENDS if role in self.special]
        known = [id for id, text in enumerate(self.tokens) if self.types[id] == CONTROL and text in END_TEXTS]
        return tuple(dict.fromkeys(named + known))


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary | None:
    """The tokens that a file's metadata describe; None if it has no tokenizer.

    Raises:
        CheckpointError: values of the wrong kind or number, or tokens that are the same.
        UnsupportedError: a tokenizer of another kind, or a setting that isn't implemented.
    """
    found = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
    kind = found.get("model", "none")
    if kind in ("none", "no_vocab"):
        return None
    if kind not in KINDS:
        raise UnsupportedError(f"a tokenizer of the kind {kind!r}; readable are {', '.join(KINDS)}")
    for key, value in found.items():
        if key not in (*USED, *UNNEEDED) and not key.endswith(ID) and value is not False:
            raise UnsupportedError(f"{PREFIX + key!r} is a setting of the tokenizer that isn't implemented")
    tokens = _list(found, "tokens", str)
    tokens = [text or f"[EMPTY_{id}]" for id, text in enumerate(tokens)]
    if len(set(tokens)) < len(tokens):
        raise CheckpointError(f"{PREFIX}tokens has {len(tokens) - len(set(tokens))} tokens twice")
    types = _list(found, "token_type", int, len(tokens))
    scores = _list(found, "scores", float, len(tokens)) if kind == "llama" else []
    if not all(map(math.isfinite, scores)):
        raise CheckpointError(f"{PREFIX}scores holds what isn't a finite number")
    merges = [_pair(text) for text in _list(found, "merges", str)] if kind == "gpt2" else []
    special, adds = _special(found, kind, len(tokens)), _adds(found)
    return Vocabulary(kind, found.get("pre"), tokens, types, scores, merges, special, adds)


def _list(found: Mapping[str, Any], key: str, kind: type, length: int | None = None) -> list[Any]:
    values = found.get(key)
    if not isinstance(values, list) or set(map(type, values)) - {kind}:
        raise CheckpointError(f"{PREFIX}{key} has to be a list of {kind.__name__}")
    if length not in (None, len(values)):
        raise CheckpointError(f"{PREFIX}{key} has {len(values)} values for {length} tokens")
    return values


def _pair(text: str) -> tuple[str, str]:
    cut = text.find(" ", 1)  # the first of the pair may itself begin with a space
    if cut < 0 or cut + 1 == len(text):
        raise CheckpointError(f"{PREFIX}merges has {text!r}, which isn't a pair")
    return text[:cut], text[cut + 1 :]


def _special(found: Mapping[str, Any], kind: str, tokens: int) -> dict[str, int]:
    """Ids by role; roles that nothing here depends on are left out."""
    special = dict(LLAMA_IDS) if kind == "llama" else {}
    for role in (*SPECIAL.values(), *ENDS):
        key = f"{role}_{ID}"
        if key in found:
            special[role] = found[key]
        if role in special and not is_whole(special[role], 0, tokens - 1):
            raise CheckpointError(f"{PREFIX}{key}={special[role]!r}, and there are {tokens} tokens")
    return special


def _adds(found: Mapping[str, Any]) -> dict[str, bool | None]:
    keys = {"bos": "add_bos_token", "eos": "add_eos_token", "space": "add_space_prefix"}
    adds = {name: found.get(key) for name, key in keys.items()}
    for name, value in adds.items():
        if not isinstance(value, bool | None):
            raise CheckpointError(f"{PREFIX}{keys[name]}={value!r}: true or false")
    return adds
