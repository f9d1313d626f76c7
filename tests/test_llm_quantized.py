"""LLM from folders with a quantization_config: the logits of transformers on the numbers that they stand for."""

import json

import pytest
import torch

import multicard as mc
import tiny_quantized as tiny
from interpreted import Interpreted
from multicard.errors import CheckpointError, UnsupportedError
from multicard.models import generate as decoding
from multicard.models.generate import Request
from multicard.models.load import load_decoder
from multicard.quantized.weight import blocks_of

PROMPTS = [[3, 100, 7, 55, 20, 1, 9, 188, 42], [17], [5, 5, 120]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """By scheme: the folder, and the logits for the first prompt."""
    folder, found = tmp_path_factory.mktemp("packed"), {}
    for name in tiny.SCHEMES:
        model = tiny.write(folder / name, name)
        with torch.no_grad():
            found[name] = folder / name, model(torch.tensor(PROMPTS[:1])).logits[0]
    return found


def all_logits(mesh, checkpoints):
    """By scheme: the logits, the report, and how many matrices are in blocks."""
    found = {}
    for name, (path, _) in checkpoints.items():
        *_, (model, report) = load_decoder(mesh, path, torch.float32)
        held = sum(blocks_of(each) is not None for each in model.parameters())
        found[name] = decoding.logits(model, PROMPTS[0]), report, held
    return found


@pytest.mark.seam
@pytest.mark.parametrize("degrees", [{"tp": 1}, {"tp": 2}, {"tp": 3}, {"tp": 4}, {"ring": 2}], ids=str)
def test_logits_are_those_of_transformers(run_on, checkpoints, degrees):
    for found in run_on(all_logits, checkpoints, **degrees):
        for name, (logits, report, held) in found.items():
            expected = checkpoints[name][1]
            torch.testing.assert_close(
                logits,
                expected,
                rtol=0,
                atol=1e-5 * expected.abs().max().item(),
                msg=lambda text, of=name: f"{of}: {text}",
            )
            assert held in (9, 8, 7, 6), name  # of 8 in layers and the head; those with a part of plain numbers aren't
            assert (report.dequantized_bytes == 0) == (held >= 8), name


def interpreted(mesh, checkpoints):
    """By scheme: tokens without and with stages as they are compiled."""
    found = {}
    for name, path in checkpoints.items():
        *_, (model, _) = load_decoder(mesh, path, torch.float32, reorder=False)
        ways = (None, Interpreted(model, path))
        found[name] = [[step[0] for step in decoding.generate(model, Request(PROMPTS[:1], 6), way)] for way in ways]
    return found


@pytest.mark.parametrize("degrees", [{"tp": 1}, {"tp": 3}], ids=str)
def test_stages_multiply_with_blocks(run_on, checkpoints, degrees):
    paths = {
        name: checkpoints[name][0] for name in ("gptq", "gptq-v2-8", "gptq-2", "fp8", "ct-int4-zeros", "ct-int8-packed")
    }
    for found in run_on(interpreted, paths, **degrees):
        for name, (eager, staged) in found.items():
            assert eager == staged, name


def test_one_call(checkpoints):
    path, expected = checkpoints["gptq"]
    with mc.LLM(path, tp=2, dtype="float32", draft=path, draft_tokens=2, timeout=30) as llm:
        assert llm.engine == "multicard"
        answer = llm.generate(PROMPTS[0], max_new_tokens=4, ignore_eos=True)
        assert answer.token_ids[0] == expected[-1].argmax().item()
        assert answer.accepted == answer.drafted > 0
        assert (
            sum(report.bytes_read for report in llm.load_reports)
            < 2 * path.joinpath("model.safetensors").stat().st_size
        )


def test_bfloat16(checkpoints):
    path, expected = checkpoints["fp8"]
    with mc.LLM(path, dtype="bfloat16", timeout=30) as llm:
        torch.testing.assert_close(llm.logits(PROMPTS[0]), expected, rtol=0, atol=0.1 * expected.abs().max().item())


Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def of_config(**changes):
    return lambda config, tensors: config["quantization_config"].update(changes)


def of_group(**changes):
    def change(config, tensors):
        config["quantization_config"]["config_groups"]["group_0"].update(changes)

    return change


def of_weights(**changes):
    def change(config, tensors):
        config["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)

    return change


def of_tensor(name, function):
    """The tensor changed; None: it is left out."""

    def change(config, tensors):
        tensors[name] = function(tensors[name])
        if tensors[name] is None:
            del tensors[name]

    return change


def unpacked(config, tensors):
    leaves = [key for key in tensors if key.startswith(UP)]
    rows = tensors[f"{UP}.scales"].shape[1]
    for key in leaves:
        del tensors[key]
    tensors[f"{UP}.weight"] = torch.zeros(rows, 96)


def tied(config, tensors):
    config["tie_word_embeddings"] = True


def unordered(config, tensors):
    config["quantization_config"]["desc_act"] = True
    del tensors[f"{Q}.g_idx"]


REFUSED = [
    (
        "gptq",
        of_config(quant_method="hqq"),
        UnsupportedError,
        r"quant_method 'hqq' isn't read; gptq, awq, fp8, compressed-tensors, bitsandbytes are",
    ),
    ("gptq", of_config(quant_method="bitsandbytes"), UnsupportedError, r"4 bits \(nf4.*quantize='int4'"),
    ("bnb-int8", of_config(load_in_4bit=True), UnsupportedError, r"4 bits \(nf4.*quantize='int4'"),
    ("bnb-int8", of_tensor(f"{UP}.weight_format", lambda x: x + 2), UnsupportedError, "weight_format is 2, an order"),
    ("bnb-int8", of_tensor(f"{UP}.SCB", lambda x: x[1:]), CheckpointError, "SCB"),
    ("gptq", of_config(bits=3), UnsupportedError, "bits=3"),
    ("gptq", of_config(group_size=0), UnsupportedError, "group_size=0"),
    ("gptq", of_config(checkpoint_format="marlin"), UnsupportedError, "checkpoint_format 'marlin'"),
    ("gptq", of_config(dynamic={"(a+)+$": {}}), UnsupportedError, r"pattern '\(a\+\)\+\$'"),
    ("gptq", of_config(dynamic={"-:(": {}}), UnsupportedError, r"pattern '\(' isn't a regular expression"),
    ("gptq", of_config(dynamic=[3]), CheckpointError, r"dynamic=\[3\]: must be an object"),
    (
        "gptq",
        of_config(group_size=16),
        CheckpointError,
        r"q_proj\.qzeros is I32 \(3, 12\) where .* asks for I32 \(6, 12\)",
    ),
    ("gptq", of_config(bits=8), CheckpointError, r"q_proj\.qweight is I32 \(12, 96\) where .* asks for I32 \(24, 96\)"),
    (
        "gptq",
        of_tensor(f"{Q}.g_idx", lambda t: t.flip(0)),
        UnsupportedError,
        r"q_proj\.g_idx.*act-order.*desc_act=false",
    ),
    (
        "gptq",
        unordered,
        CheckpointError,
        r"no tensor 'model.layers.0.self_attn.q_proj.g_idx', which desc_act=true asks",
    ),
    ("gptq", of_tensor(f"{Q}.g_idx", lambda t: t[:5]), CheckpointError, r"g_idx is I32 \(5,\); expected I32 \(96,\)"),
    (
        "gptq",
        of_tensor(f"{Q}.bias", lambda t: t + 1),
        CheckpointError,
        r"no tensor 'model.layers.0.self_attn.q_proj.bias'",
    ),
    (
        "gptq",
        of_tensor(f"{UP}.scales", lambda t: None),
        CheckpointError,
        r"no tensor 'model.layers.1.mlp.up_proj.scales'",
    ),
    (
        "gptq",
        unpacked,
        CheckpointError,
        r"up_proj\.weight is F32, where quantization_config asks for quantised weights",
    ),
    (
        "gptq",
        of_config(dynamic={"-:.*(up|v)_proj": {}}),
        CheckpointError,
        r"no tensor 'model.layers.0.mlp.up_proj.weight'",
    ),
    ("gptq-v2-8", tied, CheckpointError, r"the model of this config has no tensor 'lm_head\.\w+'"),
    ("awq", of_config(version="gemv"), UnsupportedError, "version 'gemv'"),
    ("awq", of_config(zero_point=False), UnsupportedError, "zero_point=false"),
    ("awq", of_config(group_size=24), CheckpointError, r"q_proj\.qzeros is I32 \(6, 12\) where .* I32 \(4, 12\)"),
    ("fp8", of_config(activation_scheme="static"), UnsupportedError, "activation_scheme 'static'"),
    ("fp8", of_config(weight_block_size=None), UnsupportedError, "blocks of size None"),
    ("fp8", of_config(weight_block_size=[32, 32]), CheckpointError, r"q_proj\.weight_scale_inv is BF16 \(6, 3\)"),
    ("fp8", of_tensor(f"{Q}.weight", lambda t: t.view(torch.uint8)), CheckpointError, r"q_proj\.weight is U8"),
    ("ct-int4", of_config(format="marlin-24"), UnsupportedError, "format 'marlin-24'"),
    ("ct-int4", of_config(kv_cache_scheme={"num_bits": 8}), UnsupportedError, "kv_cache_scheme"),
    ("ct-int4", of_config(sparsity_config={"format": "sparse-bitmask"}), UnsupportedError, "sparsity_config"),
    ("ct-int4", of_group(input_activations={"num_bits": 8, "dynamic": True}), UnsupportedError, "input_activations"),
    ("ct-int4", of_group(targets=["Embedding"]), UnsupportedError, "target 'Embedding'"),
    ("ct-int4", of_weights(num_bits=3), UnsupportedError, "num_bits=3"),
    ("ct-int4", of_weights(strategy="tensor_group"), UnsupportedError, "strategy='tensor_group'"),
    ("ct-int4", of_tensor(f"{Q}.weight_shape", lambda t: t + 1), CheckpointError, r"weight_shape says \(97, 97\)"),
    ("ct-int8-zeros", of_weights(symmetric=True), CheckpointError, r"weight_zero_point, where .* says symmetric"),
]


@pytest.mark.parametrize(
    ("name", "change", "kind", "said"), REFUSED, ids=lambda value: value[:30] if isinstance(value, str) else ""
)
def test_what_contradicts_is_one_line(tmp_path, name, change, kind, said):
    tiny.write(tmp_path, name, change)
    with pytest.raises(kind, match=said) as caught:
        mc.LLM(tmp_path, tp=2)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_numbers_that_are_not_numbers(run_on, tmp_path):
    """Found while reading, and told on every rank."""

    def change(config, tensors):
        tensors[f"{UP}.weight"].view(torch.uint8)[-1, -1] = 127

    tiny.write(tmp_path, "fp8", change)
    assert all("up_proj has weights that aren't numbers" in said for said in run_on(failure, tmp_path, tp=2))
    tiny.write(tmp_path, "awq", of_tensor(f"{UP}.scales", lambda t: t.fill_(torch.inf)))
    assert all("up_proj has a scale that isn't" in said for said in run_on(failure, tmp_path, tp=2))


def failure(mesh, path):
    with pytest.raises(CheckpointError) as caught:
        list(load_decoder(mesh, path, torch.float32))
    return str(caught.value)


def test_what_else_is_refused(checkpoints, tmp_path):
    path, _ = checkpoints["awq"]
    with pytest.raises(UnsupportedError, match=r"quantize='int8': .*awq holds quantised weights \(awq\), which stay"):
        mc.LLM(path, quantize="int8")
    with pytest.raises(UnsupportedError, match=r"lora=.* holds quantised weights; adapters are for"):
        mc.LLM(path, lora=tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "phi", "quantization_config": {"quant_method": "awq"}})
    )
    with pytest.raises(
        UnsupportedError, match=r"holds quantized weights.*use an unquantized checkpoint, or mc\.LLM for"
    ):
        mc.LLM(tmp_path)


def test_a_part_of_a_group_fills_the_row(run_on, tmp_path):
    """Groups of 64 in rows of 96 and 176: blocks of 32, and of 64 with an end that is empty."""
    model = tiny.write(tmp_path, "gptq", of_config(group_size=64), group=64)
    with torch.no_grad():
        expected = model(torch.tensor(PROMPTS[:1])).logits[0]
    for logits, kinds in run_on(kinds_of, tmp_path, tp=2):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        assert kinds == {"U4x32-F16z", "U4x64-F16z"}


def kinds_of(mesh, path):
    *_, (model, _) = load_decoder(mesh, path, torch.float32)
    held = [blocks_of(each) for each in model.parameters()]
    return decoding.logits(model, PROMPTS[0]), {part.kind for each in held if each is not None for part in each.parts}
