"""LoRA of diffusers' pipelines on split ones, against one process: loaded before the split and after it."""

import pytest
import torch

import multicard as mc
import pipelines
from multicard.errors import UnsupportedError

pytestmark = pytest.mark.seam

CASES = [
    ("flux", {"tp": 2}),  # its loader compares shapes
    ("flux", {"tp": 3}),
    ("flux", {"ulysses": 2}),
    ("flux2", {"tp": 2}),
    ("sd3", {"tp": 3}),
    ("sd3", {"cfg": 2}),
    ("sd3", {"cfg": 2, "tp": 2}),
    ("wan", {"tp": 2, "ring": 2}),
    ("qwen_image", {"tp": 2}),
]


def weights(name, seed):
    """A LoRA for every linear layer of the denoiser, as in files."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for path, module in pipelines.build(name)[0].transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            a, b = (
                torch.randn(5, module.in_features, generator=generator),
                torch.randn(module.out_features, 5, generator=generator),
            )
            found |= {f"transformer.{path}.lora_A.weight": a / 5, f"transformer.{path}.lora_B.weight": b / 5}
    return found


def load(pipe, name):
    for adapter, seed in (("a", 3), ("b", 4)):
        pipe.load_lora_weights(weights(name, seed), adapter_name=adapter)
    pipe.set_adapters("a")


def everything(pipe, arguments):
    """Samples after each of the things that are done to adapters."""
    yield "one", pipelines.sample(pipe, arguments)
    pipe.set_adapters(["a", "b"], [0.5, 0.7])
    pipe.fuse_lora(lora_scale=0.9, safe_fusing=True)
    yield "two, fused", pipelines.sample(pipe, arguments)
    pipe.unfuse_lora()
    yield "unfused", pipelines.sample(pipe, arguments)
    pipe.disable_lora()
    yield "disabled", pipelines.sample(pipe, arguments)
    pipe.enable_lora()
    pipe.delete_adapters("a")
    yield "deleted", pipelines.sample(pipe, arguments)
    pipe.unload_lora_weights()
    yield "unloaded", pipelines.sample(pipe, arguments)


@pytest.mark.parametrize(("name", "degrees"), CASES, ids=str)
def test_one_process_result(run_on, name, degrees):
    def here(mesh):
        found = []
        for before in (True, False):
            pipe, arguments = pipelines.build(name)
            if before:
                load(pipe, name)
            mc.parallelize(pipe, mesh)
            if not before:
                load(pipe, name)
            found.append(dict(everything(pipe, arguments)))
        return found

    pipe, arguments = pipelines.build(name)
    plain = pipelines.sample(pipe, arguments)
    load(pipe, name)
    alone = dict(everything(pipe, arguments))
    assert all(error(alone[step], plain) > 0.1 for step in alone if step not in ("disabled", "unloaded"))
    for rank in run_on(here, **degrees):
        for way in rank:
            errors = {step: error(sample, alone[step]) for step, sample in way.items()}
            assert errors == pytest.approx(dict.fromkeys(alone, 0), abs=1e-5)


def error(sample, reference):
    return float((sample - reference).abs().max() / reference.abs().max())


def test_a_lokr_is_refused(run_on):
    """Of all linear layers the first that is split is named."""

    def here(mesh):
        pipe, _ = pipelines.build("flux")
        layer = pipe.transformer.transformer_blocks[0].attn.to_q
        lokr = {
            "transformer.transformer_blocks.0.attn.to_q.lokr_w1": torch.ones(2, 2),
            "transformer.transformer_blocks.0.attn.to_q.lokr_w2": torch.ones(
                layer.out_features // 2, layer.in_features // 2
            ),
        }
        found = []
        for before in (True, False):
            pipe, _ = pipelines.build("flux")
            try:
                if before:
                    pipe.transformer.load_lora_adapter(dict(lokr))
                mc.parallelize(pipe, mesh)
                pipe.transformer.load_lora_adapter(dict(lokr))
            except UnsupportedError as refusal:
                found.append(str(refusal))
        return found

    for before, after in run_on(here, tp=2):
        assert "transformer_blocks.0.attn.to_q has an adapter of peft's lokr.layer.Linear" in before
        assert "of peft's type LOKR" in after
