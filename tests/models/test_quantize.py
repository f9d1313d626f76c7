"""Weights rounded to blocks as they are read: the same numbers at every degree, as one card would round them."""

import pytest
import torch

import multicard as mc
import tiny_decoders
from interpreted import Interpreted
from multicard.errors import ConfigError, UnsupportedError
from multicard.models.generate import Request, generate, logits
from multicard.models.load import load_decoder
from multicard.models.outline import QUANTIZE
from multicard.quantized.rounding import to_blocks
from multicard.quantized.weight import blocks_of
from multicard.quantized.words import dequantize

EXACT = {"int8": 0.5 / 127, "int4": 0.5 / 15}
"""Half a step, of the largest number of a block and of a block's span; float16's rounding of the scale comes to it."""


@pytest.mark.parametrize("columns", [32, 96, 77])
@pytest.mark.parametrize("name", QUANTIZE)
def test_rounding_is_to_the_nearest(name, columns):
    numbers = torch.randn(19, columns) * torch.logspace(-1, 4, 19)[:, None]
    numbers[3] = 0.0
    numbers[4] = 2.5
    kind = QUANTIZE[name].layers
    got = dequantize(kind, to_blocks(kind, numbers))[:, :columns]
    for start in range(0, columns, 32):
        part, back = numbers[:, start : start + 32], got[:, start : start + 32]
        filled = part if part.shape[1] == 32 else torch.nn.functional.pad(part, (0, 32 - part.shape[1]))
        step = filled.abs().amax(1) if name == "int8" else filled.amax(1) - filled.amin(1)
        slack = 2**-11 * filled.abs().amax(1) * 2 + 1e-7  # of scale and minimum
        assert ((back - part).abs().amax(1) <= EXACT[name] * step + slack).all()
    assert torch.equal(got[3], numbers[3])
    if name == "int4":  # all of them are the minimum
        assert torch.equal(got[4, :32], numbers[4, :32])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantize")
    return {name: tiny_decoders.write(folder, name)[0] for name in tiny_decoders.CHECKPOINTS}


def loaded(mesh, folder, name, prompt):
    """Logits, the report, and the numbers of this rank's matrices by name."""
    *_, (model, report) = load_decoder(mesh, folder, torch.float32, quantize=name)
    held = {each: blocks_of(p).numbers(p) for each, p in model.named_parameters() if blocks_of(p) is not None}
    return logits(model, prompt), report, held


@pytest.mark.parametrize("degrees", [{"tp": 1}, {"tp": 2}, {"tp": 3}, {"ring": 2}], ids=str)
@pytest.mark.parametrize("family", tiny_decoders.CHECKPOINTS)
@pytest.mark.parametrize("name", QUANTIZE)
def test_every_degree_computes_with_the_same_rounded_weights(run_on, checkpoints, name, family, degrees):
    prompt, model = tiny_decoders.prompts(family)[0], tiny_decoders.model(family).double()
    for module_name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            kind = QUANTIZE[name].layers if ".layers." in module_name else QUANTIZE[name].ends
            tied = module_name == "lm_head" and model.config.tie_word_embeddings
            if not tied:
                numbers = dequantize(kind, to_blocks(kind, module.weight.data.float()))
                module.weight.data = numbers[:, : module.weight.shape[1]].double()
    model.tie_weights()
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0].float()
    for got, report, held in run_on(loaded, checkpoints[family], name, prompt, **degrees):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
        assert held
        assert report.parameter_bytes < report.shard_bytes / 2  # the checkpoint is float32


def test_stages_multiply_with_rounded_weights(run_on, checkpoints):
    for eager, staged in run_on(interpreted, checkpoints["qwen3-9-over-3"], "int4", [5, 17, 3], tp=2):
        assert eager == staged


def interpreted(mesh, folder, name, prompt):
    *_, (model, _) = load_decoder(mesh, folder, torch.float32, reorder=False, quantize=name)
    return [
        [step[0] for step in generate(model, Request([prompt], 6), way)] for way in (None, Interpreted(model, folder))
    ]


def test_one_call(checkpoints):
    family = "llama-6-over-2"
    with mc.LLM(checkpoints[family], tp=2, quantize="int8", timeout=30) as llm:
        prompt = tiny_decoders.prompts(family)[0]
        assert len(llm.generate(prompt, max_new_tokens=3, ignore_eos=True).token_ids) == 3
        assert llm.load_reports[0].parameter_bytes < llm.load_reports[0].shard_bytes / 2


def test_what_is_refused(checkpoints, tmp_path):
    with pytest.raises(ConfigError, match="quantize='int3': must be None, 'int8' or 'int4'"):
        mc.LLM(checkpoints["llama-6-over-2"], quantize="int3")
    with pytest.raises(ConfigError, match=r"quantize=\[\]"):
        mc.LLM(checkpoints["llama-6-over-2"], quantize=[])
    (tmp_path / "m.gguf").touch()
    with pytest.raises(UnsupportedError, match=r"quantize='int4': .*m\.gguf is a GGUF file; its weights stay"):
        mc.LLM(tmp_path / "m.gguf", quantize="int4")
