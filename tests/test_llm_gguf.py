"""LLM from a GGUF file: the tokens of transformers on the numbers that the file stands for, on any mesh."""

import json
import pathlib
import subprocess
import sys

import pytest
import torch

import multicard as mc
import tiny_decoders
import tiny_ggufs as tiny
from interpreted import Interpreted
from multicard import axis
from multicard.errors import CheckpointError, ConfigError, UnsupportedError
from multicard.models import generate as decoding
from multicard.models.compiler import outline
from multicard.models.generate import Request
from multicard.models.load import load_decoder
from multicard.models.outline import describe
from multicard.quantized.weight import blocks_of
from multicard.quantized.words import Blocks

CACHE = pathlib.Path(__file__).parents[1] / ".cache"
SMOLLM2 = CACHE / "smollm2.gguf"
needs_smollm2 = pytest.mark.skipif(
    not SMOLLM2.exists() or not (CACHE / "smollm2" / "config.json").exists(),
    reason="make .cache/smollm2.gguf .cache/smollm2/config.json",
)
PROMPTS = [[prompt % 300 for prompt in prompts] for prompts in tiny_decoders.prompts("llama")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """By architecture: the file, transformers' logits for the first prompt, and its answers to all."""
    folder, found = tmp_path_factory.mktemp("gguf"), {}
    for family in tiny.MODELS:
        model = tiny.write(folder / f"{family}.gguf", family)
        with torch.no_grad():
            logits = model(torch.tensor(PROMPTS[:1])).logits[0]
        found[family] = folder / f"{family}.gguf", logits, [greedy(model, ids) for ids in PROMPTS]
    return found


def greedy(model, ids, new=6):
    mask = torch.ones(1, len(ids), dtype=torch.long)
    with torch.no_grad():
        said = model.generate(torch.tensor([ids]), attention_mask=mask, max_new_tokens=new, do_sample=False)
    return said[0, len(ids) :].tolist()


def answers(mesh, path, prompts):
    *_, (model, report) = load_decoder(mesh, path, torch.float32)
    steps = list(decoding.generate(model, Request(prompts, 6)))
    tokens = [[step[row] for step in steps] for row in range(len(prompts))]
    return decoding.logits(model, prompts[0]), tokens, report


@pytest.mark.seam
@pytest.mark.parametrize("family", tiny.MODELS)
@pytest.mark.parametrize(
    "degrees", [{"tp": 1}, {"tp": 2}, {"tp": 3}, {"ring": 2}, {"ulysses": 2}, {"ring": 2, "tp": 2}], ids=str
)
def test_logits_and_tokens_are_those_of_transformers(run_on, files, family, degrees):
    path, logits, expected = files[family]
    found = run_on(answers, path, PROMPTS, **degrees)
    for got, tokens, _ in found:
        torch.testing.assert_close(got, logits, rtol=0, atol=1e-5 * logits.abs().max().item())
        assert tokens == expected
    if family == "llama":  # three ranks cut heads inside blocks, and read these whole
        assert any(report.bytes_read > report.shard_bytes for *_, report in found) == (degrees.get("tp") == 3)


@pytest.mark.parametrize("tp", [1, 2, 3, 5])
@pytest.mark.parametrize("types", [["Q4_1"], ["Q8_0", "Q4_0"]], ids=str)
def test_a_rank_holds_its_share_as_it_is_in_the_file(run_on, tmp_path, types, tp):
    model = tiny.write(tmp_path / "m.gguf", "llama", types)
    expected = [greedy(model, ids) for ids in PROMPTS]
    for _, tokens, report in run_on(answers, tmp_path / "m.gguf", PROMPTS, tp=tp):
        assert tokens == expected
        assert report.dequantized_bytes == 0
        assert report.parameter_bytes < 1.03 * report.shard_bytes
        assert report.bytes_read == report.shard_bytes


def test_a_layer_that_is_in_blocks_in_part_is_dequantised(run_on, files):
    path, *_ = files["llama"]
    one, two = (run_on(answers, path, PROMPTS[:1], tp=tp)[0][2] for tp in (1, 2))
    assert one.bytes_read < path.stat().st_size
    assert two.bytes_read < 0.52 * one.bytes_read
    assert two.dequantized_bytes == one.dequantized_bytes / 2 > 0


def interpreted(mesh, path, prompt):
    """Tokens without and with stages as they are compiled, and how many steps these made."""
    *_, (model, _) = load_decoder(mesh, path, torch.float32, reorder=False)
    steps = Interpreted(model, path)
    tokens = [[step[0] for step in decoding.generate(model, Request([prompt], 6), way)] for way in (None, steps)]
    return *tokens, steps.calls


@pytest.mark.parametrize("family", tiny.MODELS)
@pytest.mark.parametrize("degrees", [{"tp": 1}, {"tp": 3}, {"ring": 2}], ids=str)
def test_stages_multiply_with_blocks(run_on, files, family, degrees):
    path, _, expected = files[family]
    for eager, staged, calls in run_on(interpreted, path, PROMPTS[0], **degrees):
        assert eager == staged == expected[0]
        assert calls


def test_one_call(files):
    path, _, expected = files["qwen2"]
    with mc.LLM(path, tp=2, dtype="float32", timeout=30) as llm:
        assert llm.engine == "multicard"
        assert [answer.token_ids for answer in llm.generate(PROMPTS, max_new_tokens=6, ignore_eos=True)] == expected
        answer = llm.generate("the sea", max_new_tokens=4, ignore_eos=True)
        assert answer.prompt_tokens == len(llm.tokenizer.encode("the sea"))
        assert answer.text == llm.tokenizer.decode(answer.token_ids)
        assert "".join(llm.stream("the sea", max_new_tokens=4, ignore_eos=True)) == answer.text


def test_bfloat16_is_the_default_where_a_half_type_is_in_the_file(files, tmp_path):
    tiny.write(tmp_path / "m.gguf", "qwen2", ["Q5_1"])
    assert describe(tmp_path / "m.gguf").dtype == torch.float32
    path, logits, _ = files["llama"]
    with mc.LLM(path, timeout=30) as llm:
        assert llm.config.dtype == torch.bfloat16
        torch.testing.assert_close(llm.logits(PROMPTS[0]), logits, rtol=0, atol=0.1 * logits.abs().max().item())
        assert llm.load_reports[0].parameter_bytes < 3 * path.stat().st_size


def test_a_draft_from_a_file(files):
    path, _, expected = files["llama"]
    with mc.LLM(path, draft=path, draft_tokens=3, dtype="float32", timeout=30) as llm:
        answer = llm.generate(PROMPTS[0], max_new_tokens=6, ignore_eos=True)
        assert answer.token_ids == expected[0]
        assert answer.accepted == answer.drafted > 0


def test_the_compiler_outlines_a_file(files):
    path, *_ = files["qwen3"]
    model = outline(str(path), 1, 2, 1, torch.float32)
    assert blocks_of(model.lm_head.weight).parts == (Blocks("Q4_1", 150, 8),)
    assert isinstance(model.mesh.tp, axis.Axis)


@pytest.mark.soak
def test_compiled_tokens_are_the_same(files, tmp_path, monkeypatch):
    monkeypatch.setenv("MULTICARD_CACHE", str(tmp_path / "cache"))
    path, _, expected = files["qwen3"]
    with mc.LLM(path, compile=True, dtype="float32", timeout=60) as llm:
        assert llm.generate(PROMPTS[0], max_new_tokens=6, ignore_eos=True).token_ids == expected[0]
    assert list((tmp_path / "cache").rglob("*.so"))


def test_what_is_refused_is_refused_without_transformers_help(files, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.gguf: no such file"):
        mc.LLM(tmp_path / "nowhere.gguf")
    tiny.write(tmp_path / "m.gguf", change=lambda writer, _: writer.add_expert_count(4))
    with pytest.raises(UnsupportedError, match=r"m\.gguf: 'llama\.expert_count' is 4") as caught:
        mc.LLM(tmp_path / "m.gguf")
    assert "transformers" not in str(caught.value)
    with pytest.raises(UnsupportedError, match=r"from_pretrained: .*llama\.gguf is a GGUF file, which mc\.LLM runs"):
        mc.from_pretrained(files["llama"][0], mc.single())
    with pytest.raises(ConfigError, match="tp=9 with 8 attention heads"):
        mc.LLM(files["llama"][0], tp=9)


def test_on_the_command_line(files):
    path, *_ = files["llama"]
    command = [sys.executable, "-m", "multicard", "generate", "--model", str(path), "--tp", "2", "the sea", "--json"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "3", "--ignore-eos"], capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout)
    assert len(said["token_ids"]) == 3
    assert said["text"]
    assert done.stderr == ""


# The real model


def smollm2_logits(mesh, path, prompt):
    *_, (model, report) = load_decoder(mesh, path, torch.float32)
    return decoding.logits(model, prompt), report


@needs_smollm2
@pytest.mark.parametrize("tp", [1, 2])
def test_smollm2_is_the_folder_that_was_made_of_it(run_on, tp):
    prompt = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2]
    found = run_on(smollm2_logits, SMOLLM2, prompt, tp=tp)
    expected = run_on(smollm2_logits, CACHE / "smollm2", prompt, tp=tp)
    for (logits, report), (same, whole) in zip(found, expected, strict=True):
        torch.testing.assert_close(logits, same, rtol=0, atol=1e-5 * same.abs().max().item())
        assert report.bytes_read < 0.2 * whole.bytes_read
        assert report.parameter_bytes < 1.005 * report.bytes_read


@needs_smollm2
def test_smollm2_answers():
    with mc.LLM(SMOLLM2, tp=2, timeout=60) as llm:
        assert "Paris" in llm.generate("What is the capital of France?", max_new_tokens=16).text
