"""Pipelines with their text encoders split over all ranks of a replica, against one process."""

import functools
import pathlib
import re
from unittest import mock

import accelerate
import diffusers
import pytest
import safetensors.torch
import torch
import transformers as hf

import multicard as mc
import pipelines
import text_pipelines
import zoo
from multicard import weights
from multicard.errors import CheckpointError, ConfigError, UnsupportedError
from multicard.integrations.diffusers.reports import held, report
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
                assert (name, label) == ("sana", "tp=2"), (name, found)
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
    clip = {**text_pipelines.CLIP, "vocab_size": 2048, "hidden_size": 64, "num_attention_heads": 4}
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


def loaded(mesh, folder, arguments, variant=None):
    pipe = mc.from_pretrained(folder, mesh, variant=variant)
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


def refusal(mesh, folder, free):
    """Load as if each rank's card had so many bytes free."""
    from multicard.integrations.diffusers import pipeline

    with mock.patch.object(pipeline, "free_bytes", return_value=free), pytest.raises(ConfigError) as refused:
        mc.from_pretrained(folder, mesh)
    return str(refused.value)


def test_a_share_that_does_not_fit_is_refused_and_degrees_that_do_are_named(run_on, tmp_path):
    even_flux(tmp_path)
    whole = sum(sizes(tmp_path).values())
    for said in run_on(refusal, str(tmp_path), int(whole * 0.4), tp=2):
        assert re.search(
            "a rank's share takes .* GiB at tp=2 and .* free: tp=4 or tp=8 would fit; dtype='bfloat16'", said
        )
    for said in run_on(refusal, str(tmp_path), 1000, tp=2):
        assert "no tp up to 64 would fit" in said


def partly(mesh, expected):
    found = {}
    for parts in (["denoiser"], ["text"], ["text", "vae"]):
        pipe, arguments = text_pipelines.build("ltx")
        mc.parallelize(pipe, mesh, parts=parts)
        got = sample(pipe, arguments)
        whole = {role: each.whole for role, each in report(pipe).items()}
        found[" ".join(parts)] = float((got - expected).abs().max()), whole
    return found


def test_parts_can_be_left_out(run_on, alone):
    for found in run_on(partly, alone("ltx"), tp=2):
        assert all(error < 1e-4 for error, _ in found.values()), found
        whole = {parts: reasons for parts, (_, reasons) in found.items()}
        assert whole["denoiser"] == {
            "transformer": None, "text_encoder": "parts= is without 'text'", "vae": "parts= is without 'vae'",
        }  # fmt: skip
        assert whole["text"]["text_encoder"] is None
        assert whole["text"]["transformer"] == "parts= is without 'denoiser'"
        assert whole["text vae"]["text_encoder"] is None


def test_text_alone_is_split(run_on, alone):
    def here(mesh, expected):
        pipe, arguments = text_pipelines.build("stable_diffusion_xl")
        mc.parallelize(pipe, mesh, parts=("text",))
        return float((sample(pipe, arguments) - expected).abs().max()), report(pipe)

    for error, found in run_on(here, alone("stable_diffusion_xl"), tp=2):
        assert error < 1e-4
        assert found["text_encoder"].whole is found["text_encoder_2"].whole is None


def test_a_folder_with_a_unet_without_a_launcher(alone, tmp_path):
    pipe, arguments = text_pipelines.build("stable_diffusion")
    pipe.save_pretrained(tmp_path)
    with mc.DiffusionPipeline(tmp_path, ulysses=2, timeout=30) as split:
        found = split(**arguments, seed=0)
        how = {name: each.how for name, each in split.load_reports[0].items()}
    assert float((torch.as_tensor(found.images) - alone("stable_diffusion")).abs().max()) < 1e-4
    assert how == {"unet": "rows over 2", "text_encoder": "weights over 2", "vae": "rows over 2"}


def without_plan(mesh):
    pipe, _ = text_pipelines.build("ltx")
    config = hf.FNetConfig(vocab_size=131, hidden_size=32, num_hidden_layers=1, intermediate_size=45)
    pipe.register_modules(text_encoder=zoo.scramble(hf.FNetModel(config)))
    expected = pipe.text_encoder(torch.arange(5)[None]).last_hidden_state
    with pytest.raises(UnsupportedError, match=r"text_encoder: .* no tensor-parallel plan.* leave 'text' out"):
        mc.parallelize(pipe, mesh, parts=("denoiser", "text"))
    mc.parallelize(pipe, mesh)
    got = pipe.text_encoder(torch.arange(5)[None]).last_hidden_state
    return torch.equal(got, expected), report(pipe)["text_encoder"].whole


def test_an_encoder_without_a_plan_stays_whole_unless_it_was_named(run_on):
    for same, why in run_on(without_plan, cfg=2):
        assert same
        assert "no tensor-parallel plan" in why


def test_names_of_parts_are_checked():
    pipe, _ = text_pipelines.build("ltx")
    with pytest.raises(ConfigError, match="unknown part 'unet': must be some of denoiser, text, vae"):
        mc.parallelize(pipe, mc.single(), parts=("unet",))
    with pytest.raises(ConfigError, match="only pipelines have parts"):
        mc.parallelize(pipe.transformer, mc.single(), parts=("denoiser",))


def offloaded(mesh, expected):
    pipe, arguments = text_pipelines.build("sd3")
    mc.parallelize(pipe, mesh)
    accelerate.cpu_offload_with_hook(pipe.text_encoder, torch.device("cpu"))  # as enable_model_cpu_offload does
    accelerate.cpu_offload(pipe.text_encoder_2, torch.device("cpu"), offload_buffers=False)  # enable_sequential_...
    diffusers.hooks.apply_group_offloading(
        pipe.text_encoder_3, torch.device("cpu"), offload_type="leaf_level", non_blocking=False
    )
    got = sample(pipe, arguments)
    embeds = pipe.encode_prompt("a cat", None, None, max_sequence_length=20)
    return float((got - expected).abs().max()), embeds


def test_offloaded_encoders(run_on, alone):
    pipe, _ = text_pipelines.build("sd3")
    wanted = pipe.encode_prompt("a cat", None, None, max_sequence_length=20)
    for error, got in run_on(offloaded, alone("sd3"), cfg=2):
        assert error < 1e-4
        for mine, theirs in zip(got, wanted, strict=True):
            assert zoo.relative_error(mine, theirs) < 1e-5


@pytest.mark.seam
def test_a_variant_of_several_files_is_read_by_slices(run_on, tmp_path):
    pipe, arguments = text_pipelines.build("flux")
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert len(list((tmp_path / "text_encoder_2").glob("*.safetensors"))) > 1
    expected = sample(pipe, arguments)
    for picture, found in run_on(loaded, str(tmp_path), arguments, "fp16", tp=2):
        assert float((picture - expected).abs().max()) < 1e-4
        for role in ("transformer", "text_encoder", "text_encoder_2"):
            assert found[role].read < 1.1 * found[role].held


def test_half_types_are_as_diffusers_loads_them(run_on, tmp_path):
    def here(mesh, folder):
        pipe = mc.from_pretrained(folder, mesh, dtype="float16")
        return {name: parameter.dtype for name, parameter in pipe.text_encoder.named_parameters()}

    text_pipelines.build("ltx")[0].save_pretrained(tmp_path)
    plain = diffusers.LTXPipeline.from_pretrained(tmp_path, dtype=torch.float16).text_encoder
    assert run_on(here, str(tmp_path), tp=2)[0] == {name: p.dtype for name, p in plain.named_parameters()}


def test_a_model_folder_and_a_single_file(run_on, tmp_path):
    def here(mesh, folder):
        pipe, arguments = text_pipelines.build("ltx")
        pipe.register_modules(transformer=mc.from_pretrained(folder, mesh))
        mc.parallelize(pipe, mesh)
        return sample(pipe, arguments)

    pipe, arguments = text_pipelines.build("ltx")
    pipe.transformer.save_pretrained(tmp_path)
    expected = sample(pipe, arguments)
    for degrees in ({"tp": 2}, {"cfg": 2}):
        for got in run_on(here, str(tmp_path), **degrees):
            assert float((got - expected).abs().max()) < 1e-4
    file = next(tmp_path.glob("*.safetensors"))
    with pytest.raises(UnsupportedError, match="is a single file: load it with diffusers' from_single_file"):
        mc.from_pretrained(file, mc.single())
    with pytest.raises(UnsupportedError, match="is a single file: load it with diffusers' from_single_file"):
        mc.DiffusionPipeline(file, cfg=2)


@pytest.mark.seam
def test_without_a_launcher(tmp_path):
    pipe, arguments = text_pipelines.build("ltx")
    pipe.save_pretrained(tmp_path)
    expected = sample(pipe, arguments, seed=3)
    with mc.DiffusionPipeline(tmp_path, cfg=2, timeout=30) as split:
        got = split(**arguments, seed=3).frames
        reports = split.load_reports
    assert float((torch.as_tensor(got) - expected).abs().max()) < 1e-4
    for rank in reports:
        assert rank["text_encoder"].whole is None
        assert (rank["vae"].how, rank["vae"].whole) == ("rows over 2", "its weights are whole")
        assert rank["transformer"].whole == "tp=1 leaves its weights whole"


def test_replicas_have_prompts_of_their_own(run_on):
    prompts = ["a cat", "a longer prompt"]

    def here(mesh):
        pipe, arguments = text_pipelines.build("ltx", prompt=prompts[mesh.dp.rank])
        return sample(mc.parallelize(pipe, mesh), arguments)

    found = run_on(here, dp=2, cfg=2)
    for rank, picture in enumerate(found):
        expected = sample(*text_pipelines.build("ltx", prompt=prompts[rank // 2]))
        assert float((picture - expected).abs().max()) < 1e-4
    assert float((found[0] - found[2]).abs().max()) > 1e-2


def damaged(mesh, folder):
    with pytest.raises(CheckpointError) as refused, mock.patch.object(weights, "load") as read:
        mc.from_pretrained(folder, mesh)
    assert not read.called
    return str(refused.value)


def test_all_components_are_checked_before_one_is_read(run_on, tmp_path):
    text_pipelines.build("ltx")[0].save_pretrained(tmp_path)
    file = tmp_path / "text_encoder" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = next(name for name in tensors if name.endswith("wo.weight"))
    safetensors.torch.save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, file)
    for said in run_on(damaged, str(tmp_path), tp=2):
        assert f"{name} has shape (32, 44) where the config asks for (32, 45)" in said


def adapter():
    """A LoRA for the text encoder of ``stable_diffusion``, as in files."""
    generator, found = torch.Generator().manual_seed(4), {}
    for layer in range(2):
        for name in ("q_proj", "out_proj"):
            path = f"text_encoder.text_model.encoder.layers.{layer}.self_attn.{name}"
            found[f"{path}.lora_A.weight"] = torch.randn(3, 32, generator=generator)
            found[f"{path}.lora_B.weight"] = torch.randn(32, 3, generator=generator)
    return found


def adapted(mesh, first):
    """Pictures with the LoRA loaded before (``first``) or after the split, and without it again."""
    pipe, arguments = text_pipelines.build("stable_diffusion")
    if first:
        pipe.load_lora_weights(adapter(), adapter_name="a")
    if mesh is not None:
        mc.parallelize(pipe, mesh)
    if not first:
        pipe.load_lora_weights(adapter(), adapter_name="a")
    with_it = sample(pipe, arguments)
    pipe.unload_lora_weights()
    return with_it, sample(pipe, arguments)


@pytest.mark.parametrize("first", [True, False])
def test_a_lora_of_a_text_encoder(run_on, first):
    expected, plain = adapted(None, first)
    assert float((expected - plain).abs().max()) > 1e-2
    for with_it, without in run_on(adapted, first, cfg=2):
        assert float((with_it - expected).abs().max()) < 1e-4
        assert float((without - plain).abs().max()) < 1e-4


def test_textual_inversion_is_refused_by_name(run_on):
    def here(mesh):
        pipe, _ = text_pipelines.build("stable_diffusion")
        mc.parallelize(pipe, mesh)
        with pytest.raises(UnsupportedError, match="resize_token_embeddings"):
            pipe.load_textual_inversion({"<new>": torch.zeros(1, 32)}, token="<new>")

    run_on(here, cfg=2)
