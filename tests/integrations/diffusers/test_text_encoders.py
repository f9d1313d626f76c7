"""Pipelines with their text encoders split over all ranks of a replica, against one process."""

import functools
import pathlib

import pytest
import safetensors.torch
import torch
import transformers as hf

import multicard as mc
import pipelines
import text_pipelines
import zoo
from multicard.errors import UnsupportedError
from multicard.integrations.diffusers.parts import held, report
from pipelines import sample

MESHES = {
    "cfg=2": {"cfg": 2},
    "ulysses=2": {"ulysses": 2},
    "tp=2": {"tp": 2},
    "cfg=2 ulysses=2": {"cfg": 2, "ulysses": 2},
}


@pytest.fixture(scope="module")
def alone():
    """What one process has, by pipeline, computed once; with one thread, as the ranks have."""

    @functools.cache
    def run(name):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return sample(*text_pipelines.build(name))
        finally:
            torch.set_num_threads(threads)

    return run


def outcomes(mesh, wanted):
    """For each pipeline the largest difference of its picture, and what this rank has of it; or why it was refused."""
    found = {}
    for name, expected in wanted.items():
        pipe, arguments = text_pipelines.build(name)
        whole = {role: held(module) for role, module in pipe.components.items() if isinstance(module, torch.nn.Module)}
        try:
            mc.parallelize(pipe, mesh)
        except UnsupportedError as error:
            found[name] = str(error)
            continue
        got = sample(pipe, arguments)
        shares = {role: each.held / whole[role] for role, each in report(pipe).items()}
        found[name] = float((got - expected).abs().max()), shares
    return found


@pytest.mark.parametrize("label", MESHES)
def test_pictures_are_those_of_one_process(run_on, alone, label):
    by_rank = run_on(outcomes, {name: alone(name) for name in text_pipelines.TEXT}, **MESHES[label])
    for rank in by_rank:
        for name, found in rank.items():
            if isinstance(found, str):
                assert name in ("stable_diffusion", "stable_diffusion_xl", "sana"), (name, found)
                assert label != "cfg=2"
                continue
            error, shares = found
            assert error < 1e-4, name
            for role, share in shares.items():
                assert not role.startswith("text") or share < 0.8, (name, role, share)


def sizes(folder):
    """Bytes of each component's weights in its files."""
    found = {}
    for file in pathlib.Path(folder).glob("*/*.safetensors"):
        found[file.parent.name] = sum(t.nbytes for t in safetensors.torch.load_file(file).values())
    return found


def even_flux(folder):
    """A pipeline whose heads, widths and vocabularies are multiples of four, in a folder."""
    pipe, arguments = text_pipelines.build("flux")
    clip = {**text_pipelines.CLIP, "vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4}
    clip |= {"intermediate_size": 128, "max_position_embeddings": 20}
    t5 = {**text_pipelines.T5, "vocab_size": 512, "d_kv": 16, "num_heads": 4, "d_ff": 256, "d_model": 128}
    sizes = {"num_attention_heads": 8, "joint_attention_dim": 128, "pooled_projection_dim": 64, "in_channels": 16}
    pipe.register_modules(
        text_encoder=zoo.scramble(hf.CLIPTextModel(hf.CLIPTextConfig(**clip))),
        text_encoder_2=zoo.scramble(hf.T5EncoderModel(hf.T5Config(**t5))),
        transformer=pipelines.flux_transformer(**sizes, guidance_embeds=True),
    )
    pipe.save_pretrained(folder)
    return sample(pipe, arguments), arguments


def loaded(mesh, folder, arguments, **options):
    pipe = mc.from_pretrained(folder, mesh, **options)
    pipe.set_progress_bar_config(disable=True)
    return sample(pipe, arguments), report(pipe)


@pytest.mark.seam
@pytest.mark.parametrize("degrees", [{"tp": 4}, {"cfg": 2, "ulysses": 2}], ids=str)
def test_each_rank_reads_and_holds_a_quarter(run_on, tmp_path, degrees):
    expected, arguments = even_flux(tmp_path)
    whole = sizes(tmp_path)
    for picture, found in run_on(loaded, str(tmp_path), arguments, **degrees):
        assert float((picture - expected).abs().max()) < 1e-4
        split = ["text_encoder", "text_encoder_2", *(["transformer"] if "tp" in degrees else [])]
        for role in split:
            assert found[role].whole is None
            assert found[role].held == pytest.approx(whole[role] / 4, rel=0.05), role
            assert found[role].read == pytest.approx(found[role].held, rel=0.1), role
        for role in found.keys() - split:
            assert found[role].whole
            assert found[role].read == whole[role], role
