"""CFG parallel: whatever a pipeline does with its branches, every rank ends with what one process has."""

import copy
import types

import diffusers
import numpy as np
import pytest
import torch

import multicard as mc
from multicard.errors import MismatchError, RankError
from pipelines import embeds, sample, wan_transformer

STEPS = 6


class Scripted(diffusers.DiffusionPipeline):
    """A pipeline whose guidance is whatever ``rule(step, branch, latents)`` does; ``branch(i)`` calls the denoiser."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, rule, batch=1, generator=None):
        latents = torch.randn(batch, 16, 1, 4, 4, generator=generator)
        self.scheduler.set_timesteps(STEPS)
        for step, t in enumerate(self.scheduler.timesteps):

            def branch(i, x=latents, t=t, **more):
                prompt = embeds(len(x), 5, 32, seed=i)
                timestep = t.expand(len(x))
                with self.transformer.cache_context(f"branch{i}"):
                    return self.transformer(x, timestep, prompt, return_dict=False, **more)[0]

            latents = self.scheduler.step(rule(step, branch, latents), t, latents, return_dict=False)[0]
        return types.SimpleNamespace(images=latents)


def scripted(layers=1):
    torch.manual_seed(0)
    transformer = wan_transformer(num_layers=layers, patch_size=(1, 1, 1)).eval().requires_grad_(False)
    return Scripted(transformer, diffusers.FlowMatchEulerDiscreteScheduler())


def two(step, branch, latents):
    cond = branch(1)
    uncond = branch(2)
    return uncond + 3 * (cond - uncond)


def three(step, branch, latents):
    full, text, none = branch(1), branch(2), branch(3)
    return none + 2 * (text - none) + 3 * (full - text)


def switched_off(step, branch, latents):
    return two(step, branch, latents) if step < 3 else branch(1)


def now_and_then(step, branch, latents):
    return two(step, branch, latents) if step % 2 else branch(1)


def scale_changes(step, branch, latents):
    cond, uncond = branch(1), branch(2)
    return uncond.lerp(cond, 1.0 + step)


def third_branch_for_a_while(step, branch, latents):
    return three(step, branch, latents) if 2 <= step < 4 else two(step, branch, latents)


def reads_early(step, branch, latents):
    cond = branch(1)
    strength = float(cond.norm())
    return branch(2) * (1 - 1 / (1 + strength)) + cond


def decides_by_value(step, branch, latents):
    cond = branch(1)
    return cond + branch(2) if cond.mean() > 0 else cond - branch(3)


def reads_with_numpy(step, branch, latents):
    cond = branch(1)
    kept = torch.from_numpy(cond.numpy().copy()) + torch.tensor(cond.tolist()) + copy.deepcopy(cond)
    return kept - np.asarray(branch(2)).sum()


def writes_in_place(step, branch, latents):
    cond = branch(1)
    scaled = cond * 2
    cond.mul_(3)
    half = cond[:, :8]
    half += 1
    uncond = branch(2)
    return uncond + cond + scaled


def writes_into_the_last(step, branch, latents):
    cond, uncond = branch(1), branch(2)
    cond -= uncond
    uncond.add_(cond, alpha=3)
    return uncond


def changes_the_input(step, branch, latents):
    mine = latents.clone()
    cond = branch(1, x=mine)
    mine.mul_(0.5)
    half = branch(2, x=mine)
    mine.mul_(0.5)
    return cond + half if step % 3 else cond


def casts_and_slices(step, branch, latents):
    cond = branch(1).double()[:, :16].reshape(1, 16, 16).transpose(1, 2).chunk(2, dim=1)
    second = cond[1] * 2 - 1 + latents.double().mean()
    latents = latents + 1
    uncond = branch(2).double().reshape(1, 16, 16).transpose(1, 2)
    out = uncond + torch.cat([cond[0], second], 1)
    return out.transpose(1, 2).reshape(1, 16, 1, 4, 4).float()


def other_sizes(step, branch, latents):
    wide = branch(2, x=torch.cat([latents, latents], -1))
    return branch(1) + wide[..., :4]


def one_batch_and_one_more(step, branch, latents):
    both = branch(1, x=torch.cat([latents, latents]))
    a, b = both.chunk(2)
    return a + 2 * b + (branch(3) if step > 1 else 0)


def draws_noise_between(step, branch, latents):
    cond = branch(1)
    noise = torch.randn(cond.shape, generator=torch.Generator().manual_seed(step))
    return branch(2, x=latents + 0.1 * noise) + cond


def five(step, branch, latents):
    return sum(branch(i) / (i + 1) for i in range(5))


RULES = [
    two, three, switched_off, now_and_then, scale_changes, third_branch_for_a_while, reads_early, decides_by_value,
    reads_with_numpy, writes_in_place, writes_into_the_last, changes_the_input, casts_and_slices, other_sizes,
    one_batch_and_one_more, draws_noise_between, five,
]  # fmt: skip


@pytest.fixture(scope="module")
def alone():
    """By rule and batch, what one process has."""
    cases = [(rule, batch) for rule in RULES for batch in ((1,) if rule is casts_and_slices else (1, 3))]
    return {(rule, batch): sample(scripted(), {"rule": rule, "batch": batch}) for rule, batch in cases}


def errors_of_rules(mesh, alone):
    """For every rule and batch: the largest error of two runs, and whether the runs end bitwise the same everywhere."""
    errors = {}
    for (rule, batch), expected in alone.items():
        pipe = mc.parallelize(scripted(), mesh)
        runs = [sample(pipe, {"rule": rule, "batch": batch}) for _ in range(2)]
        scale = expected.abs().max()
        errors[rule.__name__, batch] = (max(float((run - expected).abs().max() / scale) for run in runs), runs)
    return errors


@pytest.mark.parametrize("cfg", [pytest.param(2, marks=pytest.mark.seam), 3])
def test_exact_whatever_the_pipeline_does(run_on, alone, cfg):
    by_rank = run_on(errors_of_rules, alone, cfg=cfg)
    wrong = {case: error for case, (error, _) in by_rank[0].items() if not error < 1e-5}
    differ = [
        case
        for case, (_, runs) in by_rank[0].items()
        for other in by_rank[1:]
        if not all(torch.equal(a, b) for a, b in zip(runs, other[case][1], strict=True))
    ]
    assert not wrong
    assert not differ


@pytest.mark.parametrize(
    ("rule", "batch", "cfg", "later"),
    [(two, 1, 2, [6, 6]), (three, 1, 3, [6, 6, 6]), (three, 2, 2, [18, 18]), (five, 1, 2, [18, 12]),
     (two, 2, 4, [6, 6, 6, 6]), (one_batch_and_one_more, 1, 3, [9, 9, 6])],
)  # fmt: skip
def test_rows_are_dealt_out_evenly(run_on, rule, batch, cfg, later):
    counts = run_on(count_rows, rule, batch, cfg=cfg)
    assert [second for _, second in counts] == later


def count_rows(mesh, rule, batch):
    pipe = mc.parallelize(scripted(), mesh)
    rows = []
    pipe.transformer.patch_embedding.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    counts = []
    for _ in range(2):
        rows.clear()
        sample(pipe, {"rule": rule, "batch": batch})
        counts.append(sum(rows))
    return counts


def failures(mesh):
    """What each rank sees when a denoiser raises, when seeds differ, and whether the pipeline works afterwards."""
    pipe = mc.parallelize(scripted(), mesh)
    arguments = {"rule": two}
    expected = sample(pipe, arguments)
    seen = {}

    def broken(*args, **kwargs):
        raise FloatingPointError("this rank's denoiser is broken")

    for step in (0, 3):
        plain = pipe.transformer.forward

        def breaks(at, branch, latents, step=step, plain=plain):
            if at == step and mesh.cfg.rank == 1:
                pipe.transformer.forward = broken
            return two(at, branch, latents)

        try:
            sample(pipe, {"rule": breaks})
        except Exception as error:
            seen[f"broken at {step}"] = error
        pipe.transformer.__dict__.pop("forward", None)
    for name, seed in (("other seed", mesh.cfg.rank), ("other seed in a new shape", mesh.cfg.rank)):
        try:
            sample(pipe, {**arguments, "batch": 1 + ("shape" in name)}, seed=seed)
        except Exception as error:
            seen[name] = error
    seen["afterwards"] = torch.equal(sample(pipe, arguments), expected)
    return seen


@pytest.mark.seam
def test_failures_reach_every_rank(run_on):
    first, second = run_on(failures, cfg=2)
    for step in (0, 3):
        assert isinstance(first[f"broken at {step}"], RankError)
        assert "rank 1" in str(first[f"broken at {step}"])
        assert isinstance(second[f"broken at {step}"], FloatingPointError)
    for rank in (first, second):
        assert isinstance(rank["other seed"], MismatchError)
        assert isinstance(rank["other seed in a new shape"], MismatchError)
        assert "seed" in str(rank["other seed"])
        assert rank["afterwards"]


def bare(mesh, batch):
    model = scripted().transformer
    arguments = (torch.randn(batch, 16, 1, 4, 4, generator=torch.Generator().manual_seed(3)), torch.full((batch,), 500))
    prompt = embeds(batch, 5, 32)
    expected = model(*arguments, prompt).sample
    model = mc.parallelize(scripted().transformer, mesh)
    runs = [model(*arguments, encoder_hidden_states=prompt).sample for _ in range(3)]
    return max(float((run - expected).abs().max()) for run in runs)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_bare_denoiser_splits_its_batch(run_on, batch):
    assert max(run_on(bare, batch, cfg=2)) < 1e-5
