"""LLM on architectures that our decoder isn't: by transformers, and it says so."""

import json
import subprocess
import sys

import pytest
import torch

import multicard as mc
import zoo

pytestmark = pytest.mark.seam


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("gemma3")
    zoo.build("gemma3").save_pretrained(path)
    return path


def alone(prompt, new):
    model = zoo.build("gemma3")
    return model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False)[0, len(prompt) :].tolist()


def test_answers_are_those_of_transformers(folder):
    prompts = [list(range(3, 20)), [7, 8, 9], list(range(40, 45))]
    with mc.LLM(folder, tp=2, progress=False) as llm:
        assert llm.engine == "transformers"
        answers = llm.generate(prompts, max_new_tokens=6)
        logits = llm.logits(prompts[0])
        sampled = [llm.generate(prompts[1], max_new_tokens=6, temperature=1.0, top_k=9, seed=5).token_ids for _ in "ab"]
    assert [answer.token_ids for answer in answers] == [alone(prompt, 6) for prompt in prompts]
    with torch.no_grad():
        expected = zoo.build("gemma3")(torch.tensor([prompts[0]])).logits[0]
    assert zoo.relative_error(logits, expected) <= 1e-5
    assert sampled[0] == sampled[1]


def test_the_command_line_says_so(folder):
    command = [sys.executable, "-m", "multicard", "generate", "--model", str(folder), "--ring", "2", "--json", "hello"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2  # text without a tokenizer
    assert "so it runs on transformers" in refused.stderr
    assert "tokenizer" in refused.stderr


def test_what_neither_can_split_is_refused_before_a_rank_starts(tmp_path):
    import transformers as hf

    hf.MambaForCausalLM(hf.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1)).save_pretrained(tmp_path)
    with pytest.raises(mc.errors.UnsupportedError, match="MambaForCausalLM"):
        mc.LLM(tmp_path, tp=2)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "no-such-model"}))
    with pytest.raises(mc.errors.CheckpointError, match="transformers doesn't know this model"):
        mc.LLM(tmp_path, tp=2)
