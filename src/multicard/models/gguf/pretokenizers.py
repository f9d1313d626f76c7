"""How text is cut before its pieces are merged, by the name that a GGUF file gives the rule.

Each rule is a list of patterns: the first cuts the text into its matches and what is between them, the next cuts these
pieces, and so on. They are those of the models' own tokenizers; llama.cpp (``llama-vocab.cpp``) names them.
"""

from __future__ import annotations

from typing import NamedTuple

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"


class Rule(NamedTuple):
    """How one family of tokenizers cuts text.

    Attributes:
        patterns: one after the other.
        whole_first: a piece that is a token is taken whole, even if no merges lead to it.
        bos: a text begins with the "bos" token unless the file says otherwise.
        normal_form: Unicode's NFC comes first.
    """

    patterns: tuple[str, ...]
    whole_first: bool = False
    bos: bool = False
    normal_form: bool = False


LLAMA3 = Rule((rf"{ENDINGS}|{WORD}|\p{{N}}{{1,3}}|{REST}",), whole_first=True, bos=True)
QWEN2 = Rule((rf"{ENDINGS}|{WORD}|\p{{N}}|{REST}",), normal_form=True)
TEKKEN = Rule(
    (rf"{CASED}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",), whole_first=True, bos=True
)
DEEPSEEK_CODER = Rule((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", DIGIT))
SINGLE_DIGITS = Rule((DIGIT, GPT2))

RULES = {
    "gpt-2": Rule((GPT2,)),
    "smollm": SINGLE_DIGITS,
    "starcoder": SINGLE_DIGITS,
    "refact": SINGLE_DIGITS,
    "codeshell": SINGLE_DIGITS,
    "minerva-7b": SINGLE_DIGITS,
    "llama-bpe": LLAMA3,
    "llama-v3": LLAMA3,
    "llama3": LLAMA3,
    "falcon3": LLAMA3,
    "smaug-bpe": Rule(LLAMA3.patterns),
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "megrez": QWEN2,
    "tekken": TEKKEN,
    "deepseek-coder": DEEPSEEK_CODER,
}
