"""One rank gets another input than the others: a MismatchError on every rank, and no picture."""

import random

import diffusers
import pytest
import torch

import multicard as mc
from more_pipelines import stable_diffusion_xl  # noqa: F401  registers itself
from multicard.errors import MismatchError
from pipelines import build, embeds, last_bit

MODELS = {  # an argument of each with the prompt, and one with the size
    "dit": ("class_labels", None),
    "wan": ("prompt_embeds", "height"),
    "flux": ("prompt_embeds", "width"),
    "flux_true_cfg": ("negative_prompt_embeds", "height"),
    "stable_diffusion_xl": ("prompt_embeds", "height"),
}
MESHES = {
    2: [{"cfg": 2}, {"ulysses": 2}, {"ring": 2}, {"tp": 2}],
    3: [{"cfg": 3}, {"ulysses": 3}, {"ring": 3}, {"tp": 3}],
    4: [{"cfg": 4}, {"cfg": 2, "tp": 2}, {"cfg": 2, "ulysses": 2}, {"ulysses": 2, "tp": 2}, {"ring": 2, "ulysses": 2}],
}
ONLY_CFG = ("stable_diffusion_xl",)


def another_prompt(pipe, arguments, model):
    name = MODELS[model][0]
    value = arguments[name]
    arguments[name] = [*value[:-1], value[-1] + 1] if isinstance(value, list) else last_bit(value)


def another_size(pipe, arguments, model):
    name = MODELS[model][1]
    if name is None:  # the picture is as large as the model says; another number of pictures then
        another_batch(pipe, arguments, model)
    else:
        arguments[name] += 16


def another_batch(pipe, arguments, model):
    name = MODELS[model][0]
    value = arguments[name]
    if isinstance(value, list):
        arguments[name] = value[:-1]
    else:
        arguments["num_videos_per_prompt" if model == "wan" else "num_images_per_prompt"] = 2


def another_seed(pipe, arguments, model):
    arguments["generator"] = torch.Generator().manual_seed(12)


def no_generator(pipe, arguments, model):
    arguments["generator"] = None


def another_dtype(pipe, arguments, model):
    pipe.to(torch.bfloat16)


def one_step_more(pipe, arguments, model):
    arguments["num_inference_steps"] += 1


def another_scale(pipe, arguments, model):
    name = "true_cfg_scale" if model == "flux_true_cfg" else "guidance_scale"
    arguments[name] = arguments.get(name, 5.0) + 1e-9


def another_scheduler(pipe, arguments, model):
    settings = {"shift": 2.0} if "Flow" in type(pipe.scheduler).__name__ else {"beta_end": 0.03}
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **settings)


CASES = [
    another_prompt, another_size, another_batch, another_seed, no_generator, another_dtype, one_step_more,
    another_scale, another_scheduler,
]  # fmt: skip


def outcome(mesh, model, case, odd):
    """What a rank sees when rank ``odd`` is given something else: the error's type and text, or the picture."""
    pipe, arguments = build(model, generator=torch.Generator().manual_seed(11))
    mc.parallelize(pipe, mesh)
    if mesh.rank == odd:
        case(pipe, arguments, model)
    try:
        return pipe(**arguments)
    except MismatchError as error:
        return str(error)


def outcomes(mesh, draws):
    return [outcome(mc.init_mesh(mc.ParallelConfig(**degrees)), *draw) for degrees, *draw in draws]


def draw(size, count, seed):
    """``count`` of mesh, model, case and odd rank, drawn at random from all that exist for ``size`` ranks."""
    chance = random.Random(seed)
    every = [
        (degrees, model, case)
        for degrees in MESHES[size]
        for model in MODELS
        for case in CASES
        if set(degrees) == {"cfg"} or model not in ONLY_CFG
    ]
    return [(*each, chance.randrange(size)) for each in chance.sample(every, count)]


def check(run_on, size, count, seed):
    draws = draw(size, count, seed)
    by_rank = run_on(outcomes, draws, dp=size)
    for i, (degrees, model, case, odd) in enumerate(draws):
        for rank in by_rank:
            assert isinstance(rank[i], str), (degrees, model, case.__name__, odd)


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.seam), 3, 4])
def test_a_rank_with_another_input_is_told(run_on, size):
    check(run_on, size, 12, seed=size)


@pytest.mark.soak
@pytest.mark.parametrize("size", [2, 3, 4])
def test_two_hundred_at_random(run_on, size):
    check(run_on, size, 70, seed=100 + size)


@pytest.mark.parametrize("degrees", [{"cfg": 2}, {"ulysses": 2}, {"tp": 2}], ids=str)
def test_noise_without_a_generator_is_the_same_on_every_rank(run_on, degrees):
    """A scheduler that adds noise, and start noise, both from generators that ranks have in different states."""

    def pictures(mesh):
        pipe, arguments = build("dit")
        pipe.scheduler = diffusers.DDPMScheduler()
        mc.parallelize(pipe, mesh)
        torch.manual_seed(7 + mesh.rank)
        return pipe(**arguments).images

    pipe, arguments = build("dit")
    pipe.scheduler = diffusers.DDPMScheduler()
    torch.manual_seed(7)
    expected = pipe(**arguments).images
    first, second = run_on(pictures, **degrees)
    assert torch.equal(first, second)
    assert (first - expected).abs().max() / expected.abs().max() < 1e-5


def test_a_bare_model_and_a_callback_are_compared_too(run_on):
    def errors(mesh):
        pipe, arguments = build("wan", generator=torch.Generator().manual_seed(11))
        mc.parallelize(pipe, mesh)

        def meddle(pipe, step, t, given):
            return {"latents": last_bit(given["latents"])} if mesh.rank and step == 1 else {}

        found = []
        x = embeds(1, 16, 1, 4, 4)
        calls = (
            lambda: pipe(**arguments, callback_on_step_end=meddle),
            lambda: pipe.transformer(last_bit(x) if mesh.rank else x, torch.tensor([500]), embeds(1, 5, 32)),
            lambda: pipe.transformer(x, torch.tensor([500 + mesh.rank]), embeds(1, 5, 32)),
        )
        for call in calls:
            with pytest.raises(MismatchError) as caught:
                call()
            found.append(str(caught.value))
        return found

    for degrees in ({"cfg": 2}, {"ulysses": 2}, {"tp": 2}):
        for callback, latents, timestep in run_on(errors, **degrees):
            assert "WanTransformer3DModel" in callback or "transformer: ranks were given" in callback
            assert "hidden_states is" in latents
            assert "timestep is" in timestep
