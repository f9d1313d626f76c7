"""What pipelines do beside calling their denoiser: compare types, read signatures, store attention, compile, share."""

import copy
import dataclasses
import inspect

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from test_guidance import Scripted, scripted

import multicard as mc
from more_pipelines import sd3_pag
from multicard.axis import Axis
from multicard.errors import UnsupportedError
from multicard.integrations.diffusers.checks import check_sequence
from multicard.integrations.diffusers.doors import open_pipeline
from multicard.integrations.diffusers.families import BATCH
from multicard.integrations.diffusers.plans import sequence_plan
from pipelines import build, embeds, sample


def test_objects_keep_their_class_and_signatures():
    """Bria compares its scheduler's type; others pass ``eta`` to the schedulers whose ``step`` takes it."""
    transformer = scripted().transformer
    schedulers = [diffusers.DDIMScheduler(), diffusers.DDPMScheduler(), diffusers.FlowMatchEulerDiscreteScheduler()]
    plain = [inspect.signature(scheduler.step) for scheduler in schedulers]
    for scheduler in schedulers:
        pipe = Scripted(transformer, scheduler)
        open_pipeline(pipe, dataclasses.replace(mc.single(), cfg=Axis("cfg", 0, 2)), BATCH)
        assert type(pipe) is Scripted
    assert [inspect.signature(scheduler.step) for scheduler in schedulers] == plain
    assert "eta" in plain[0].parameters
    assert "eta" not in plain[1].parameters
    assert type(transformer) is diffusers.WanTransformer3DModel
    assert type(schedulers[0]) is diffusers.DDIMScheduler
    assert list(inspect.signature(Scripted.__call__).parameters) == ["self", "rule", "batch", "generator"]


def copies(mesh):
    """A copy of a guided denoiser is one by itself: with weights of its own, and no part in any exchange."""
    model = mc.parallelize(scripted().transformer, mesh)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.mul_(1.5)
    arguments = (embeds(2, 16, 1, 4, 4), torch.full((2,), 500), embeds(2, 5, 32))
    expected = scripted().transformer
    for parameter in expected.parameters():
        parameter.mul_(1.5)
    found = other(*arguments).sample if mesh.rank == 0 else expected(*arguments).sample
    return torch.equal(found, expected(*arguments).sample)


def test_a_copy_of_a_guided_denoiser(run_on):
    assert all(run_on(copies, cfg=2))


class Storing:
    """An attention processor that keeps what it sees, as pipelines that edit by attention maps have."""

    def __init__(self, inner, store):
        self.inner, self.store = inner, store

    def __call__(self, attn, hidden_states, *args, **kwargs):
        out = self.inner(attn, hidden_states, *args, **kwargs)
        self.store["steps"].append(out.abs().mean(dim=(1, 2)))
        return out


def reads_the_store(step, branch, latents):
    uncond, cond = branch(1, x=torch.cat([latents, latents])).chunk(2)
    strength = torch.stack(branch.pipe.store["steps"]).mean(0).chunk(2)[1]
    return uncond + strength.mean() * cond


def one_branch_is_stored(step, branch, latents):
    cond, uncond = branch(1), branch(2)
    return cond + torch.stack(branch.pipe.store["steps"]).mean() * uncond


def storing():
    pipe = scripted()
    pipe.store = {"steps": []}
    attn = pipe.transformer.blocks[0].attn1
    attn.processor = Storing(attn.processor, pipe.store)
    return pipe


def stored(mesh):
    errors = {}
    for rule in (reads_the_store, one_branch_is_stored):
        results = []
        for parallel in (False, True):
            pipe = storing()
            if parallel:
                mc.parallelize(pipe, mesh)

            def with_pipe(step, branch, latents, rule=rule, pipe=pipe):
                branch.pipe = pipe
                return rule(step, branch, latents)

            results.append(torch.stack([sample(pipe, {"rule": with_pipe}) for _ in range(2)]))
        errors[rule.__name__] = float((results[1] - results[0]).abs().max() / results[0].abs().max())
    return errors


def test_processors_that_keep_what_they_see(run_on):
    for errors in run_on(stored, cfg=2):
        assert all(error < 1e-5 for error in errors.values()), errors


def compiled(mesh, degrees):
    """Errors of a compiled denoiser, by when it was compiled; or why that was refused."""
    mesh = mc.init_mesh(mc.ParallelConfig(**degrees))
    found = {}
    pipe, arguments = build("dit")
    expected = sample(pipe, arguments)
    for when in ("before", "after"):
        pipe, arguments = build("dit")
        steps = [lambda pipe: mc.parallelize(pipe, mesh), compile_denoiser]
        try:
            for step in steps if when == "after" else reversed(steps):
                step(pipe)
        except UnsupportedError as error:
            found[when] = str(error)
            continue
        runs = [sample(pipe, arguments) for _ in range(2)]
        found[when] = max(float((run - expected).abs().max() / expected.abs().max()) for run in runs)
    return found


def in_one_graph(mesh, name, backend, repeated):
    """The error of a denoiser that Dynamo has to trace whole (or each kind of block of it), exchanges and all."""
    torch._dynamo.reset()
    pipe, arguments = build(name)
    expected = sample(pipe, arguments)
    pipe, arguments = build(name)
    mc.parallelize(pipe, mesh)
    options = {"backend": backend, "fullgraph": True}
    if repeated:
        pipe.transformer.compile_repeated_blocks(**options)
    else:
        pipe.transformer = torch.compile(pipe.transformer, **options)
    return float((sample(pipe, arguments) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("name", "degrees", "backend", "repeated"),
    [
        ("dit", {"ring": 3}, "aot_eager", False),
        ("dit", {"ring": 2}, "inductor", False),
        ("flux", {"ulysses": 4}, "aot_eager", False),  # more ranks than heads
        ("wan", {"tp": 3}, "aot_eager", False),
        ("wan", {"cfg": 2, "ulysses": 2}, "aot_eager", False),
        ("flux", {"ring": 2, "ulysses": 2}, "aot_eager", True),
    ],
    ids=str,
)
def test_a_split_denoiser_compiles_into_one_graph(run_on, name, degrees, backend, repeated):
    assert max(run_on(in_one_graph, name, backend, repeated, **degrees)) < 1e-5


def compile_denoiser(pipe):
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


@pytest.mark.parametrize("degrees", [{"cfg": 2}, {"tp": 2}], ids=str)
def test_compiled_denoisers(run_on, degrees):
    for found in run_on(compiled, degrees, dp=2):
        assert found["after"] < 1e-5
        if "cfg" in degrees:
            assert found["before"] < 1e-5
        else:
            assert "parallelize, then compile" in found["before"]


def bare(mesh):
    """A denoiser without a pipeline, compiled in place: its error, and the batches that were compiled."""
    torch._dynamo.reset()
    batches = set()

    def backend(graph, inputs):
        batches.update(x.shape[0] for x in inputs if isinstance(x, torch.Tensor) and x.dim() == 4 and x.shape[2] == 8)
        return graph.forward

    pipe, _ = build("dit")
    model, channels = pipe.transformer, pipe.transformer.config.in_channels
    side, labels = model.config.sample_size, torch.arange(4)
    given = {"hidden_states": torch.randn(4, channels, side, side), "timestep": torch.full((4,), 5)}
    given["class_labels"] = labels % 3
    with torch.no_grad():
        expected = model(**given).sample
        mc.parallelize(model, mesh)
        wrapped = torch.compile(model, backend="eager")
        with pytest.raises(UnsupportedError, match="in place, with its own method compile"):
            wrapped(**given)
        model.compile(backend=backend)
        errors = [float((model(**given).sample - expected).abs().max()) for _ in range(3)]
    return max(errors), batches, side


def test_guidance_of_a_compiled_denoiser_is_divided(run_on):
    for error, batches, side in run_on(bare, cfg=2):
        assert side == 8, "sizes of the example changed: `bare` looks for pictures of 8 rows"
        assert error < 1e-5
        assert 2 in batches, batches


def with_backends(mesh):
    """Errors with attention backends that end in torch's own, chosen by name."""
    pipe, arguments = build("flux")
    expected, found = sample(pipe, arguments), {}
    for backend in ("_native_math", "native"):  # the last stays every model's: it is the default
        pipe, arguments = build("flux")
        pipe.transformer.set_attention_backend(backend)
        assert pipe.transformer.transformer_blocks[0].attn.processor._attention_backend == backend
        mc.parallelize(pipe, mesh)
        found[backend] = float((sample(pipe, arguments) - expected).abs().max() / expected.abs().max())
    return found


@pytest.mark.parametrize("degrees", [{"ulysses": 2}, {"ring": 2}], ids=str)
def test_backends_that_end_in_torchs_own(run_on, degrees):
    for found in run_on(with_backends, **degrees):
        assert all(error < 1e-5 for error in found.values()), found


@pytest.mark.parametrize("backend", ["FLEX", "SAGE", "_NATIVE_NPU"])
def test_other_backends_are_refused_before_a_forward(backend):
    model = build("flux")[0].transformer
    model.transformer_blocks[0].attn.processor._attention_backend = AttentionBackendName[backend]
    said = f"attention backend {backend.lower()}: set_attention_backend\\('native'\\)"
    with pytest.raises(UnsupportedError, match=said):
        check_sequence(model, sequence_plan(model))


def shared(mesh):
    """Two pipelines of one denoiser, both split; and one of them again."""
    pipe, arguments = build("sd3")
    expected = sample(pipe, arguments)
    other = diffusers.StableDiffusion3Img2ImgPipeline(**pipe.components)
    for each in (pipe, other, pipe):
        mc.parallelize(each, mesh)
    return float((sample(pipe, arguments) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("degrees", [{"cfg": 2}, {"ulysses": 2}, {"tp": 2}], ids=str)
def test_two_pipelines_share_a_denoiser(run_on, degrees):
    assert max(run_on(shared, **degrees)) < 1e-5


def test_perturbed_attention_is_refused_before_a_forward(run_on):
    def refusal(mesh):
        with pytest.raises(UnsupportedError, match="perturbed attention guidance") as caught:
            mc.parallelize(sd3_pag()[0], mesh)
        return str(caught.value)

    assert all("StableDiffusion3Pipeline" in message for message in run_on(refusal, ulysses=2))


class Adapted(torch.nn.Module):
    """A layer and what is added to it, as peft wraps one: the module that was there is inside, hooks and all."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        noise = torch.Generator().manual_seed(3)
        self.more = torch.nn.Linear(base_layer.in_features, base_layer.out_features, bias=False).requires_grad_(False)
        self.more.weight.copy_(torch.randn(self.more.weight.shape, generator=noise) / 10)

    def forward(self, x):
        return self.base_layer(x) + self.more(x)


def adapted(mesh, layer):
    """Errors of a pipeline with an adapter on ``layer``, by when it was put there; and what the adapter changes."""

    def adapt(pipe):
        setattr(pipe.transformer, layer, Adapted(getattr(pipe.transformer, layer)))

    pipe, arguments = build("flux")
    plain = sample(pipe, arguments)
    adapt(pipe)
    expected = sample(pipe, arguments)
    found = {"changes": float((expected - plain).abs().max() / expected.abs().max())}
    for when in ("before", "after"):
        pipe, arguments = build("flux")
        steps = [lambda pipe: mc.parallelize(pipe, mesh), adapt]
        for step in steps if when == "after" else reversed(steps):
            step(pipe)
        found[when] = float((sample(pipe, arguments) - expected).abs().max() / expected.abs().max())
    return found


@pytest.mark.parametrize("layer", ["x_embedder", "proj_out"])
def test_adapters_at_the_ends_of_a_split_sequence(run_on, layer):
    for found in run_on(adapted, layer, ulysses=2):
        assert found["changes"] > 0.01
        assert max(found["before"], found["after"]) < 1e-5
