"""LoRA of diffusers' pipelines on split ones, against one process: loaded before the split and after it."""

import diffusers.loaders.peft
import pytest
import safetensors.torch
import torch

import multicard as mc
import pipelines
from multicard.cli import main
from multicard.errors import CheckpointError, ConfigError, UnsupportedError

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


@pytest.mark.skipif(
    not hasattr(diffusers.loaders.peft, "_create_lokr_config"), reason="diffusers reads LoKr files from 0.42 on"
)
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline's folder with two LoRAs of it beside."""
    path = tmp_path_factory.mktemp("flux")
    pipe, _ = pipelines.build("flux")
    pipe.save_pretrained(path / "pipeline")
    for number, seed in enumerate((3, 4)):
        (path / str(number)).mkdir()
        safetensors.torch.save_file(weights("flux", seed), path / str(number) / "pytorch_lora_weights.safetensors")
    return path


@pytest.mark.parametrize("degrees", [{"tp": 2}, {"ulysses": 2}], ids=str)
def test_from_files(folder, degrees):
    pipe, arguments = pipelines.build("flux")
    for number in range(2):
        pipe.load_lora_weights(folder / str(number), adapter_name=str(number))
    pipe.set_adapters(["0", "1"])
    alone = pipelines.sample(pipe, arguments)
    loras = [folder / "0", str(folder / "1" / "pytorch_lora_weights.safetensors")]
    with mc.DiffusionPipeline(folder / "pipeline", lora=loras, timeout=30, **degrees) as split:
        assert error(split(**arguments, seed=0).images, alone) <= 1e-5


def test_files_that_are_refused(folder, tmp_path, capsys):
    pipeline = folder / "pipeline"
    (tmp_path / "pickled.bin").touch()
    (tmp_path / "damaged.safetensors").write_bytes(b"12345678910")
    safetensors.torch.save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    cases = {
        "pickled.bin": (UnsupportedError, "is read from a safetensors file"),
        "damaged.safetensors": (CheckpointError, "truncated or not safetensors"),
        "other.safetensors": (CheckpointError, "no tensor in it is a LoRA's"),
        "none.safetensors": (CheckpointError, "no such file"),
        ".": (CheckpointError, "2 safetensors files in it; name the LoRA's file"),
    }
    for name, (kind, said) in cases.items():
        with pytest.raises(kind, match=said):
            mc.DiffusionPipeline(pipeline, tp=2, lora=tmp_path / name)
    with pytest.raises(ConfigError, match="lora=3: must be a path"):
        mc.DiffusionPipeline(pipeline, lora=3)
    with pytest.raises(SystemExit, match="2"):
        main(["image", "--model", str(pipeline), "--lora", str(tmp_path / "other.safetensors"), "a cat"])
    assert "no tensor in it is a LoRA's" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["wider", "elsewhere"])
def test_a_lora_of_another_model(folder, tmp_path, change):
    """One line from every rank."""
    found = weights("flux", 3)
    if change == "wider":
        found = {name: torch.cat([x, x], 1) if "lora_A" in name else x for name, x in found.items()}
    else:
        found = {name.replace("transformer.", "unet."): x for name, x in found.items()}
    safetensors.torch.save_file(found, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="a LoRA of another model") as caught:
        mc.DiffusionPipeline(folder / "pipeline", tp=2, lora=tmp_path / "lora.safetensors", timeout=30)
    assert "\n" not in str(caught.value)
