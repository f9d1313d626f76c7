"""A tokenizer made from the tokens in a GGUF file."""

from __future__ import annotations

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from multicard.errors import CheckpointError, UnsupportedError
from multicard.models.gguf.pretokenizers import RULES
from multicard.models.gguf.vocabulary import BYTE, CONTROL, NORMAL, SPECIAL, UNKNOWN, USER_DEFINED, Vocabulary

SPACE = "▁"
MOST_WORK = 1 << 30  # characters that are looked at for merges: some seconds


def build(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """The tokenizer of these tokens.

    Raises:
        CheckpointError: merges of what isn't a token, or no token to put at the front where the file asks for one.
        UnsupportedError: a rule for cutting text that isn't implemented.
    """
    made = _byte_level(vocabulary) if vocabulary.kind == "gpt2" else _sentence_piece(vocabulary)
    for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            made.add_tokens([AddedToken(text, special=kind != USER_DEFINED, normalized=False)])
    _add_ends(made, vocabulary)
    return made


def special_tokens(vocabulary: Vocabulary) -> dict[str, str]:
    """The special tokens that a chat template may name: ``bos_token`` and so on."""
    ids = vocabulary.special
    return {name: vocabulary.tokens[ids[role]] for name, role in SPECIAL.items() if role in ids}


def _byte_level(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """BPE over bytes (https://github.com/openai/gpt-2): text is cut, and its pieces' bytes are merged."""
    rule = RULES.get(vocabulary.pre or "")
    if rule is None:
        raise UnsupportedError(
            f"tokenizer.ggml.pre {vocabulary.pre!r}: the rule for cutting text isn't one of {', '.join(RULES)}"
        )
    if vocabulary.adds["space"]:
        raise UnsupportedError("tokenizer.ggml.add_space_prefix with a tokenizer of the kind 'gpt2'")
    ids = {text: id for id, text in enumerate(vocabulary.tokens)}
    for left, right in vocabulary.merges:
        if not {left, right, left + right} <= ids.keys():
            raise CheckpointError(f"tokenizer.ggml.merges joins {left!r} and {right!r}, and not all are tokens")
    made = tokenizers.Tokenizer(models.BPE(ids, vocabulary.merges, ignore_merges=rule.whole_first))
    if rule.normal_form:
        made.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in rule.patterns]
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    return made


def _sentence_piece(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """BPE with scores (https://github.com/google/sentencepiece): spaces are characters, and the two neighbours are
    merged that make the token of the highest score; characters without a token become bytes."""
    ids = {text: id for id, text in enumerate(vocabulary.tokens)}
    made = tokenizers.Tokenizer(
        models.BPE(
            ids,
            _merges(vocabulary),
            unk_token=vocabulary.tokens[vocabulary.special["unknown"]],
            fuse_unk=True,
            byte_fallback=BYTE in vocabulary.types,
        )
    )
    prefix = vocabulary.adds["space"] is not False
    made.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(SPACE)] if prefix else []), normalizers.Replace(" ", SPACE)]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return made


def _merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, the token of the highest score first."""
    if sum(len(text) ** 2 for text in vocabulary.tokens) > MOST_WORK:
        raise CheckpointError("tokenizer.ggml.tokens are too long: their squared lengths add up to more than 2^30")
    scores = {
        text: score
        for text, kind, score in zip(vocabulary.tokens, vocabulary.types, vocabulary.scores, strict=True)
        if kind == NORMAL
    }
    found = [
        (-score, text[:cut], text[cut:])
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    return [(left, right) for _, left, right in sorted(found, key=lambda pair: pair[0])]


def _add_ends(made: tokenizers.Tokenizer, vocabulary: Vocabulary) -> None:
    """Make it put "bos" before a text, and "eos" after it, where the file or the kind of tokenizer asks for them."""
    adds = dict(vocabulary.adds)
    if adds["bos"] is None:
        adds["bos"] = vocabulary.kind == "llama" or RULES[vocabulary.pre or ""].bos
    wanted = [role for role in ("bos", "eos") if adds[role]]
    missing = [role for role in wanted if role not in vocabulary.special]
    if missing:
        raise CheckpointError(f"a text needs a {missing[0]} token, and the file names none")
    if wanted:
        pairs = [(f"<{role}>", vocabulary.special[role]) for role in wanted]
        single = [*(["<bos>"] if "bos" in wanted else []), "$A", *(["<eos>"] if "eos" in wanted else [])]
        made.post_processor = processors.TemplateProcessing(single=single, special_tokens=pairs)
