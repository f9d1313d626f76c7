"""``LLM`` with drafts, from the folder to the command line: the same answers, and refusals before a rank starts."""

import itertools
import json
import re
import shutil
from unittest import mock

import pytest

import multicard as mc
import tiny_decoders as tiny
from multicard import engines
from multicard.cli import main
from multicard.errors import CheckpointError, ConfigError, UnsupportedError

NAME, OTHER = "qwen2-6-over-2", "llama-7-heads"
PROMPTS = [[11, 12, 13, 14, 15] * 5, [3, 1, 4]]
KINDS = [{}, {"temperature": 0.9, "seed": 7}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafts")
    return [tiny.write(folder, name)[0] for name in (NAME, OTHER)]


def answers(llm):
    """Of each prompt alone and of both as a batch, greedy and sampled."""
    return [
        answer
        for kind in KINDS
        for prompts in ([PROMPTS[0]], [PROMPTS[1]], PROMPTS)
        for answer in llm.generate(prompts, max_new_tokens=20, **kind)
    ]


@pytest.fixture(scope="module")
def plain(folders):
    with mc.LLM(folders[0]) as llm:
        found = answers(llm)
        assert llm.draft_load_reports == []
    assert not any(answer.drafted for answer in found)
    return [answer.token_ids for answer in found]


@pytest.mark.parametrize("degrees", [{"tp": 2}, {"dp": 2}, {"ring": 2}], ids=str)
def test_a_smaller_checkpoint_drafts(folders, plain, degrees):
    with mc.LLM(folders[0], draft=folders[1], draft_tokens=3, timeout=30, **degrees) as llm:
        found = answers(llm)
        assert [answer.token_ids for answer in found] == plain
        one, other, *both = found[:4]
        assert one.drafted > one.accepted >= 0
        assert other.drafted > other.accepted >= 0
        assert [answer.drafted > 0 for answer in both] == ["dp" in degrees] * 2, "of a batch, a replica's last answer"
        assert len(llm.load_reports) == len(llm.draft_load_reports) == llm.degrees.world_size
        assert llm.draft_load_reports[0].bytes_read != llm.load_reports[0].bytes_read


def test_the_prompt_drafts_and_streams(tmp_path, folders, plain):
    folder = shutil.copytree(folders[0], tmp_path / "with-tokenizer")
    words(folder)
    with mc.LLM(folder, draft="prompt", timeout=30) as llm:
        found = answers(llm)
        assert [answer.token_ids for answer in found] == plain
        assert found[0].drafted > 0
        streamed = "".join(llm.stream(" ".join(f"w{i}" for i in PROMPTS[0]), max_new_tokens=20))
        assert streamed == llm.tokenizer.decode(plain[0])


def words(folder):
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(1003)}, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def steps_of(mesh, loaded):
    kinds = loaded.compilation, loaded.compilation.of(1 + loaded.drafting.most), loaded.drafting.compilation
    return [compilation.step() is not None for compilation in kinds]


def test_a_draft_model_is_compiled(folders, plain, tmp_path):
    """It is the model itself: compiled once, and always right."""
    env = {"MULTICARD_COMPILE": "1", "MULTICARD_CACHE": str(tmp_path / "cache")}
    with mc.LLM(folders[0], draft=folders[0], compile=True, threads_per_rank=1, env=env) as llm:
        found = answers(llm)
        assert [answer.token_ids for answer in found] == plain
        assert found[0].accepted == found[0].drafted > 10
        assert llm._run(steps_of) == [[True] * 3]


# ---- refusals


@pytest.fixture
def no_ranks(monkeypatch):
    def start(*args, **options):
        raise AssertionError("ranks were started")

    monkeypatch.setattr("multicard.session.Ranks", start)


def rewritten(folder, target, **changes):
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


@pytest.mark.parametrize("wrong", [0, -1, 65, 1.5, "4", True, None])
def test_numbers_of_drafts(folders, no_ranks, wrong):
    with pytest.raises(ConfigError, match=r"draft_tokens=.*: a whole number from 1 to 64"):
        mc.LLM(folders[0], draft="prompt", draft_tokens=wrong)


@pytest.mark.parametrize("wrong", [True, 5, ["prompt"]])
def test_values_that_cannot_be_drafts(folders, no_ranks, wrong):
    with pytest.raises(ConfigError, match="must be None, 'prompt' or a checkpoint's folder"):
        mc.LLM(folders[0], draft=wrong)


def test_folders_that_cannot_draft(folders, no_ranks, tmp_path):
    with pytest.raises(CheckpointError, match=r"draft='/nowhere': .*no such checkpoint folder"):
        mc.LLM(folders[0], draft="/nowhere")
    with pytest.raises(CheckpointError, match=r"draft=.*model\.safetensors"):
        mc.LLM(folders[0], draft=rewritten(folders[1], tmp_path / "sizes", intermediate_size=99))
    with pytest.raises(UnsupportedError, match=r"draft=.*model_type 'gpt2'"):
        mc.LLM(folders[0], draft=rewritten(folders[1], tmp_path / "kind", model_type="gpt2"))
    with pytest.raises(ConfigError, match=r"draft=.*tp=6 with 5 attention heads"):
        mc.LLM(folders[0], draft=tiny.write(tmp_path, "mistral-5-over-1")[0], tp=6)


def test_another_vocabulary(folders, no_ranks, tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.COMMON, "vocab_size", 1004)
    with pytest.raises(ConfigError, match=r"draft=.*a vocabulary of 1004 tokens, and the model's has 1003"):
        mc.LLM(folders[0], draft=tiny.write(tmp_path, OTHER)[0])


def test_only_our_own_decoder_takes_drafts(tmp_path, no_ranks):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=50, n_positions=16)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="draft='prompt': transformers runs this model"):
        mc.LLM(tmp_path, draft="prompt")


def load_with_little_memory(mesh, model, draft):
    """What is said where the model fits, and nothing beside it."""
    import multicard.models.load as module

    free = itertools.chain([1 << 40], itertools.repeat(1000))
    with mock.patch.object(module, "free_bytes", side_effect=free):
        try:
            list(engines.load(mesh, "multicard", str(model), engines.Loading(None, False, False, draft, 4)))
        except ConfigError as error:
            return str(error)


def test_a_draft_model_that_does_not_fit_is_named(run_on, folders):
    said = run_on(load_with_little_memory, *folders, tp=2)
    assert said[0] == said[1]
    assert re.match(rf"draft='{folders[1]}': a shard takes .* GiB at tp=2", said[0])


# ---- the command line


def test_generate_reports_drafts(folders, plain, capsys):
    words(folders[0])
    prompt = " ".join(f"w{i}" for i in PROMPTS[0])
    asked = ["generate", "--model", str(folders[0]), prompt, "--max-new-tokens", "20", "--json"]
    for draft in ("prompt", str(folders[1])):
        with pytest.raises(SystemExit, match="0"):
            main([*asked, "--draft", draft, "--draft-tokens", "3"])
        found = json.loads(capsys.readouterr().out)
        assert found["token_ids"] == plain[0]
        assert found["drafted"] > 0
        assert 0 <= found["accepted"] <= found["drafted"]
    with pytest.raises(SystemExit, match="2"):
        main([*asked, "--draft", "/nowhere"])
    assert "no such checkpoint folder" in capsys.readouterr().err
