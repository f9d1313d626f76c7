"""diffusers' caches between steps on every mesh: what one process has with the same cache, or a refusal by name."""

import collections
import functools

import diffusers
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from test_guidance import scripted, switched_off, two

import multicard as mc
from multicard.errors import RankError, UnsupportedError
from pipelines import build, embeds, sample, wan_transformer

pytestmark = pytest.mark.seam

STEPS = 7
RATIOS = [1.0, 1.02, 1.03, 1.01, 1.02, 1.01, 1.03]
MESHES = {
    "cfg=2": {"cfg": 2},
    "cfg=3": {"cfg": 3},
    "ulysses=2": {"ulysses": 2},
    "ring=3": {"ring": 3},
    "tp=2": {"tp": 2},
    "cfg=2 ulysses=2": {"cfg": 2, "ulysses": 2},
}


def first_block(threshold):
    return lambda pipe: diffusers.FirstBlockCacheConfig(threshold=threshold)


def mag(pipe):
    return diffusers.MagCacheConfig(mag_ratios=RATIOS, max_skip_steps=2, num_inference_steps=STEPS)


def taylor(**changes):
    settings = {"cache_interval": 3, "disable_cache_before_step": 2, "taylor_factors_dtype": torch.float32}
    return lambda pipe: diffusers.TaylorSeerCacheConfig(**settings, **changes)


def broadcast(pipe):
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, cross_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(100, 850), cross_attention_timestep_skip_range=(100, 850),
        current_timestep_callback=lambda: int(pipe.current_timestep),
    )  # fmt: skip


def faster(pipe):
    return diffusers.FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 850), unconditional_batch_skip_range=3,
        unconditional_batch_timestep_skip_range=(-1, 850), tensor_format="BFCHW",
        current_timestep_callback=lambda: int(pipe.current_timestep), attention_weight_callback=lambda _: 0.5,
    )  # fmt: skip


def sea(pipe):
    return diffusers.SeaCacheConfig(threshold=1.0)


BATCHED = "takes both branches of guidance out of one batch"
ONE_STATE = "keeps one state for several calls of a step"
CASES = {  # pipeline, cache, why it is refused with cfg
    "first block, branches": ("flux_true_cfg", first_block(0.45), None),
    "first block, a batch": ("ltx", first_block(0.131), None),
    "first block, two streams": ("hunyuan_video", first_block(0.26), None),
    "mag, branches": ("wan", mag, None),
    "mag, a batch": ("ltx", mag, None),
    "taylor, branches": ("flux_true_cfg", taylor(), None),
    "taylor, a batch": ("cogvideox", taylor(cache_identifiers=["transformer_blocks.*attn1"]), None),
    "taylor lite": ("ltx", taylor(use_lite_mode=True), None),
    "broadcast, a batch": ("cogvideox", broadcast, None),
    "broadcast, branches": ("wan", broadcast, ONE_STATE),
    "faster": ("cogvideox", faster, BATCHED),
}
if hasattr(diffusers, "SeaCacheConfig"):
    CASES["sea"] = ("wan", sea, None)


def projections(model):
    """Counts the calls of each projection to queries: fewer where a block or its attention is skipped."""
    calls = collections.Counter()
    for path, module in model.named_modules():
        if path.endswith("to_q"):
            module.register_forward_pre_hook(lambda module, args, path=path: calls.update([path]))
    return calls


@pytest.fixture(scope="module")
def alone():
    """``alone(case)``: latents, and calls of each projection, of one process; computed once."""

    @functools.cache
    def run(case):
        name, config, _ = CASES[case]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            pipe, arguments = build(name, num_inference_steps=STEPS)
            without = projections(pipe.transformer)
            plain = sample(pipe, arguments)
            pipe, arguments = build(name, num_inference_steps=STEPS)
            calls = projections(pipe.transformer)
            pipe.transformer.enable_cache(config(pipe))
            latents = sample(pipe, arguments)
        finally:
            torch.set_num_threads(threads)
        assert float((latents - plain).abs().max() / plain.abs().max()) > 1e-4, "the cache changes nothing"
        assert 0 < min(calls[path] / count for path, count in without.items()) < 1, "no step is skipped, or all are"
        return latents, dict(calls)

    return run


def outcome(mesh, name, config, when, wanted):
    """Errors of two runs and the calls of one, or the refusal."""
    pipe, arguments = build(name, num_inference_steps=STEPS)
    try:
        if when == "before":
            pipe.transformer.enable_cache(config(pipe))
        mc.parallelize(pipe, mesh)
        if when == "after":
            pipe.transformer.enable_cache(config(pipe))
        calls = projections(pipe.transformer)
        latents = [sample(pipe, arguments) for _ in range(2 if mesh.cfg.size > 1 else 1)]
    except UnsupportedError as error:
        return str(error)
    return [float((x - wanted).abs().max() / wanted.abs().max()) for x in latents], dict(calls)


@pytest.mark.parametrize("label", MESHES)
def test_a_cache_gives_what_one_process_has(run_on, alone, label):
    degrees = MESHES[label]
    for number, (case, (name, config, refused)) in enumerate(CASES.items()):
        latents, calls = alone(case)
        for when in ("before", "after") if label in ("cfg=2", "tp=2") else (("before", "after")[number % 2],):
            found = run_on(outcome, name, config, when, latents, **degrees)
            if refused and "cfg" in degrees:
                assert all(isinstance(told, str) and refused in told for told in found), (case, when, found)
                continue
            for errors, mine in found:
                assert max(errors) < 1e-5, (case, when, errors)
                assert "cfg" in degrees or mine == calls, (case, when)


class Keeps(ModelHook):
    _is_stateful = True


def unknown(pipe):
    HookRegistry.check_if_exists_or_initialize(pipe.transformer.blocks[0]).register_hook(Keeps(), "keeps")


def calibrated(pipe):
    pipe.transformer.enable_cache(diffusers.MagCacheConfig(calibrate=True, num_inference_steps=STEPS))


def refusals(mesh, spoil):
    told = []
    for when in ("before", "after"):
        pipe = scripted(layers=2)
        steps = [lambda pipe=pipe: mc.parallelize(pipe, mesh), lambda pipe=pipe: spoil(pipe)]
        try:
            for step in steps if when == "after" else reversed(steps):
                step()
            sample(pipe, {"rule": two})
        except UnsupportedError as error:
            told.append(str(error))
    return told


@pytest.mark.parametrize("degrees", [{"cfg": 2}, {"ulysses": 2}, {"ring": 2}], ids=str)
def test_what_is_refused_before_a_forward(run_on, degrees):
    words = {
        unknown: "has a Keeps, which keeps state from step to step",
        calibrated: "MagCache, which is being calibrated",
    }
    for spoil, expected in words.items():
        for told in run_on(refusals, spoil, **degrees):
            assert len(told) == 2
            assert all(expected in message and "disable_cache()" in message for message in told)


def read_early(step, branch, latents):
    cond = branch(1)
    weight = 1.0 if step < 3 else float(cond.clamp(1, 1).mean())
    return weight * branch(2) + cond


def changed(mesh, rule):
    """Steps whose calls change part way: the error of the run, and of another after it without the cache."""
    pipe = mc.parallelize(scripted(layers=2), mesh)
    pipe.transformer.enable_cache(diffusers.MagCacheConfig(mag_ratios=RATIOS, num_inference_steps=STEPS))
    try:
        return sample(pipe, {"rule": rule})
    except (UnsupportedError, RankError) as error:
        found = error
    pipe.transformer.disable_cache()
    expected = sample(scripted(layers=2), {"rule": rule})
    assert float((sample(pipe, {"rule": rule}) - expected).abs().max() / expected.abs().max()) < 1e-5
    return found


def test_a_cache_that_only_another_rank_has(run_on):
    for found in run_on(changed, switched_off, cfg=2):
        assert isinstance(found, UnsupportedError)
        assert "a step ended after 1 of 2 calls" in str(found)
    first, second = run_on(changed, read_early, cfg=2)
    assert isinstance(second, UnsupportedError)
    assert "an output was read before the step's last call" in str(second)
    assert isinstance(first, RankError)


def of_rows(mesh):
    """SeaCache averages over the batch, of which each rank would have a part."""
    pipe, arguments = build("wan", num_inference_steps=STEPS, prompt_embeds=embeds(2, 9, 32), guidance_scale=1.0)
    arguments.pop("negative_prompt_embeds")
    mc.parallelize(pipe, mesh)
    pipe.transformer.enable_cache(sea(pipe))
    with pytest.raises(UnsupportedError, match="SeaCache, which can't work on a part of the batch"):
        sample(pipe, arguments)
    return True


@pytest.mark.skipif("sea" not in CASES, reason="this diffusers has no SeaCache")
def test_a_cache_of_the_whole_batch(run_on):
    assert all(run_on(of_rows, cfg=2))


def broken(mesh):
    """A rank that raises before the ranks measure together."""
    pipe, arguments = build("ltx", num_inference_steps=STEPS)
    mc.parallelize(pipe, mesh)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.08))
    expected = sample(pipe, arguments)
    count = iter(range(100))

    def fail(module, args):
        if next(count) == 3 and mesh.cfg.rank == 1:
            raise FloatingPointError("broken")

    handle = pipe.transformer.proj_in.register_forward_pre_hook(fail)
    try:
        sample(pipe, arguments)
    except (FloatingPointError, RankError) as error:
        found = error
    handle.remove()
    pipe.maybe_free_model_hooks()
    assert float((sample(pipe, arguments) - expected).abs().max() / expected.abs().max()) < 1e-5
    return found


def test_a_rank_that_raises_before_the_measurement(run_on):
    first, second = run_on(broken, cfg=2)
    assert isinstance(first, RankError)
    assert "rank 1" in str(first)
    assert isinstance(second, FloatingPointError)


def enabled_between(mesh):
    def run(pipe, arguments):
        def enable(pipe, step, t, kwargs):
            if step == 1:
                pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.45))
            return kwargs

        found = sample(pipe, {**arguments, "callback_on_step_end": enable})
        pipe.transformer.disable_cache()
        return found, sample(pipe, arguments)

    wanted = run(*build("flux_true_cfg", num_inference_steps=STEPS))
    pipe, arguments = build("flux_true_cfg", num_inference_steps=STEPS)
    found = run(mc.parallelize(pipe, mesh), arguments)
    assert not torch.equal(*wanted)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.skipif(not hasattr(HookRegistry, "invalidate_child_registries_cache"), reason="fails on one process too")
@pytest.mark.parametrize("degrees", [{"cfg": 2}, {"ulysses": 2}], ids=str)
def test_enabled_between_two_steps(run_on, degrees):
    assert max(run_on(enabled_between, **degrees)) < 1e-5


def bare(mesh):
    """A denoiser without a pipeline: each call's batch is split, and the decision is that of the whole batch."""

    def run(model):
        model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.2))
        calls, found = projections(model), []
        for step in range(STEPS):
            x = embeds(3, 16, 1, 4, 4) + 0.4 * step * torch.tensor([0.1, 1, 2]).view(3, 1, 1, 1, 1)
            with model.cache_context("all"):
                found.append(model(x, torch.full((3,), 500 - step), embeds(3, 5, 32), return_dict=False)[0])
        return torch.stack(found), calls["blocks.1.attn1.to_q"]

    def made():
        torch.manual_seed(0)
        return wan_transformer(patch_size=(1, 1, 1)).eval().requires_grad_(False)

    expected, calls = run(made())
    assert 1 < calls < STEPS, calls
    return float((run(mc.parallelize(made(), mesh))[0] - expected).abs().max() / expected.abs().max())


def test_a_bare_denoiser(run_on):
    assert max(run_on(bare, cfg=2)) < 1e-5
    assert max(run_on(bare, ring=3)) < 1e-5


def replaced(mesh):
    """The cache of a function of diffusers' own, on a layer that tp replaces: it can't be put back."""
    from diffusers.hooks.taylorseer_cache import apply_taylorseer_cache

    pipe, arguments = build("ltx")
    expected = sample(pipe, arguments)
    apply_taylorseer_cache(pipe.transformer, taylor(use_lite_mode=True)(pipe))
    with pytest.raises(UnsupportedError, match="TaylorSeer on a Linear, which tp replaces: enable it by enable_cache"):
        mc.parallelize(pipe, mesh)
    HookRegistry.check_if_exists_or_initialize(pipe.transformer).remove_hook("taylorseer_cache")
    return torch.equal(sample(pipe, arguments), expected)


def test_a_cache_on_a_layer_that_is_replaced(run_on):
    assert all(run_on(replaced, tp=2))
