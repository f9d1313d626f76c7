"""Tokenizers made from GGUF files give the ids of the libraries that the models were trained with."""

import io
import json
import pathlib

import gguf
import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizers import pre_tokenizers
from transformers.convert_slow_tokenizer import TikTokenConverter

import tiny_ggufs as tiny
from multicard.errors import CheckpointError
from multicard.models.gguf.pretokenizers import RULES
from multicard.models.tokenizer import Tokenizer

SMOLLM2 = pathlib.Path(__file__).parents[2] / ".cache"
TEXTS = [
    "",
    " ",
    "the sea is calm tonight",
    "  two  spaces   three\n\n\nlines \n\t tabs\r\n end ",
    "12345 2024-01-31 3.14 x12y  7   89 ½ ٣٤",
    "It's WE'RE they'LL ſ's don'T 'S",
    "Zoë naïve e\u0301 ﬁ — “quotes” … 東京タワー 한국어 हिन्दी עברית",
    "😀👩‍👩‍👧 🇫🇷 \u200b\ufeff\0 \u00a0nbsp",
    "def f(x):\n    return x**2  # comment\n",
    "<|im_start|>user hello<|im_end|>\n<|im_start|> <tool>x",
    "<|im_start",
    "▁under ▁ score",
    "HTTPServer HelloWorld ÉCOLE été",
    "a" * 50 + "!" * 30,
]
LEARNED = [
    "the sea is calm tonight, 12 2024  and the moon lies fair\n\nwe're IT's they'll  \n\n",
    "日本 naïve 😀 !!! ... HelloWorld def f(x):",
]


def written(path, made, pre, change=None):
    """A file with nothing but a tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    tiny.words(writer, made, pre)
    if change is not None:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Tokenizer.of(path)


def cut_by(made, *cuts):
    """That tokenizer, cutting text by other rules."""
    other = tokenizers.Tokenizer.from_str(made.to_str())
    other.pre_tokenizer = pre_tokenizers.Sequence(list(cuts))
    return other


def smollm(made):
    """SmolLM's own tokenizer.json: single digits, then GPT-2's rule."""
    return cut_by(made, pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False))


def llama3(made):
    """By transformers' converter of Llama 3's tokens, whose model takes whole pieces first."""
    rule = tokenizers.Regex(TikTokenConverter().pattern)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    other = cut_by(made, pre_tokenizers.Split(rule, "isolated"), bytes_only)
    other.model.ignore_merges = True
    return other


def qwen2(made):
    model = json.loads(made.to_str())["model"]
    theirs = transformers.Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    other = theirs.backend_tokenizer
    other.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"])
    return other


ORACLES = {"gpt-2": lambda made: made, "smollm": smollm, "llama-bpe": llama3, "qwen2": qwen2}


@pytest.fixture(scope="module")
def trained():
    return tiny.trained(600, [*LEARNED, *TEXTS] * 3)


@pytest.mark.seam
@pytest.mark.parametrize("pre", ORACLES)
def test_ids_are_those_of_the_model_s_own_tokenizer(tmp_path, trained, pre):
    found, expected = written(tmp_path / "m.gguf", trained, pre), ORACLES[pre](trained)
    first = [1] if pre == "llama-bpe" else []
    for text in TEXTS:
        ids = expected.encode(text).ids
        assert found.encode(text, raw=True) == first + ids, text
        assert found.decode(ids) == expected.decode(ids, skip_special_tokens=True)
        assert "".join(found.pieces(ids)) == found.decode(ids)


def test_rules_differ(tmp_path, trained):
    """Each of these texts is cut otherwise by at least one other rule."""
    by_rule = {pre: written(tmp_path / f"{pre}.gguf", trained, pre) for pre in RULES}
    ids = {pre: tuple(tuple(made.encode(text, raw=True)) for text in TEXTS) for pre, made in by_rule.items()}
    assert len({ids[pre] for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "deepseek-coder")}) == 6


CUTS = {
    "tekken": ("HelloWorld2024  of\n\n'S", ["Hello", "World", "2", "0", "2", "4", " ", " of", "\n\n", "'S"]),
    "deepseek-coder": ("a  b1\n(x) 東", ["a", " ", " b", "1", "\n", "(", "x", ")", " ", "東"]),
    "llama-bpe": ("It'S 12345  x\n", ["It", "'S", " ", "123", "45", " ", " x", "\n"]),
    "smollm": ("x12  3", ["x", "1", "2", "  ", "3"]),
}


@pytest.mark.parametrize("pre", CUTS)
def test_where_text_is_cut(pre):
    text, expected = CUTS[pre]
    pieces = [text]
    for pattern in RULES[pre].patterns:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        pieces = [part for piece in pieces for part, _ in split.pre_tokenize_str(piece)]
    assert pieces == expected


def test_tokens_of_the_user_s_are_text_and_control_tokens_are_not(tmp_path, trained):
    kinds = [3, 3, 3, 4, *[1] * (trained.get_vocab_size() - 4)]
    made = written(tmp_path / "m.gguf", trained, "gpt-2", lambda writer: writer.add_token_types(kinds))
    ids = made.encode("a<tool>b<|im_end|>", raw=True)
    assert ids[1] == 3
    assert ids[-1] == 2
    assert made.decode(ids) == "a<tool>b"
    assert list(made.pieces(ids)) == ["a", "<tool>", "b"]


def test_tokens_at_both_ends(tmp_path, trained):
    def change(writer):
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(True)

    made = written(tmp_path / "m.gguf", trained, "llama-bpe", change)
    assert made.encode("a", raw=True) == [1, *trained.encode("a").ids, 2]
    none = written(tmp_path / "n.gguf", trained, "llama-bpe", lambda writer: writer.add_add_bos_token(False))
    assert none.encode("a", raw=True) == trained.encode("a").ids


def test_the_chat_template_names_special_tokens(tmp_path, trained):
    def change(writer):
        writer.add_chat_template("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")

    made = written(tmp_path / "m.gguf", trained, "llama-bpe", change)
    assert made.encode("a") == [1, *trained.encode("a").ids, 2]


def test_files_without_a_tokenizer(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert Tokenizer.of(tmp_path / "m.gguf") is None


# SentencePiece


def sentence_piece(size=420, **options):
    """A trained model of Llama's kind: BPE with bytes for unknown characters, and text as it is."""
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LEARNED * 5),
        model_writer=content,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())


def written_pieces(path, model, change=None):
    writer = gguf.GGUFWriter(path, "llama")
    ids = range(model.vocab_size())
    writer.add_tokenizer_model("llama")
    writer.add_token_list([model.id_to_piece(id) for id in ids])
    writer.add_token_scores([model.get_score(id) for id in ids])
    kinds = [(model.is_unknown, 2), (model.is_control, 3), (model.is_unused, 5), (model.is_byte, 6)]
    writer.add_token_types([next((kind for test, kind in kinds if test(id)), 1) for id in ids])
    if change is not None:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Tokenizer.of(path)


PIECES = [text for text in TEXTS if "\0" not in text] + LEARNED


@pytest.mark.seam
@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_are_those_of_sentencepiece(tmp_path, prefix):
    model = sentence_piece(add_dummy_prefix=prefix)
    change = None if prefix else lambda writer: writer.add_add_space_prefix(False)
    made = written_pieces(tmp_path / "m.gguf", model, change)
    for text in PIECES:
        ids = model.encode(text)
        assert made.encode(text, raw=True) == [1, *ids], text
        assert made.decode(ids) == model.decode(ids)
        assert "".join(made.pieces(ids)) == made.decode(ids)


def test_scores_that_are_no_numbers(tmp_path):
    model = sentence_piece()
    with pytest.raises(CheckpointError, match="scores holds what isn't a finite number"):
        written_pieces(tmp_path / "m.gguf", model, lambda w: w.add_token_scores([float("nan")] * model.vocab_size()))


def test_tokens_that_would_take_hours(tmp_path):
    model = sentence_piece()
    tokens = ["a" * 40_000, *(model.id_to_piece(id) for id in range(1, model.vocab_size()))]
    with pytest.raises(CheckpointError, match=r"tokenizer.ggml.tokens are too long"):
        written_pieces(tmp_path / "m.gguf", model, lambda writer: writer.add_token_list(tokens))


def test_smollm2_is_cut_by_its_own_rule():
    """The same ids as from the folder, but where the folder, made by transformers' converter, leaves digits joined."""
    path = SMOLLM2 / "smollm2.gguf"
    if not path.exists() or not (SMOLLM2 / "smollm2" / "tokenizer.json").exists():
        pytest.skip("make .cache/smollm2.gguf .cache/smollm2/config.json")
    made, folder = Tokenizer.of(path), tokenizers.Tokenizer.from_file(str(SMOLLM2 / "smollm2" / "tokenizer.json"))
    expected = smollm(folder)
    expected.normalizer = None
    for text in TEXTS:
        assert made.encode(text, raw=True) == expected.encode(text).ids, text
    chat = made.encode("What is the capital of France?")
    assert chat == Tokenizer.of(SMOLLM2 / "smollm2").encode("What is the capital of France?")
