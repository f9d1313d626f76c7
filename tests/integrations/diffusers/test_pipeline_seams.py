"""Every seam into diffusers, broken on purpose: an error that says so, never another picture."""

import functools

import pytest
import torch
import torch.nn.functional as F
from test_guidance import scripted, two

import multicard as mc
from multicard.errors import UnsupportedError
from pipelines import build, embeds

pytestmark = pytest.mark.seam


def take_hooks_off(model):
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()


def take_the_gather_off(model):
    model.proj_out._forward_hooks.clear()


def forget_our_forward(model):
    """As ``remove_hook`` of another library does, which puts the class's ``forward`` back."""
    for block in model.blocks:
        block.attn1.__dict__.pop("forward")


def forget_one_forward(model):
    model.blocks[-1].attn1.__dict__.pop("forward")


def attend_elsewhere(model):
    """A processor that calls a kernel of its own."""

    def attention(attn, hidden_states, *args, **kwargs):
        q, k, v = (f(hidden_states).unflatten(2, (attn.heads, -1)) for f in (attn.to_q, attn.to_k, attn.to_v))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return attn.to_out[0](torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))

    for block in model.blocks:
        block.attn1.processor = attention


def fuse_the_feed_forward(model):
    for block in model.blocks:
        ff = block.ffn
        block.ffn.forward = functools.partial(fused, ff)


def fused(ff, x):
    return F.linear(ff.net[0](x), ff.net[2].weight, ff.net[2].bias)


SABOTAGE = {
    "hooks taken off": (take_hooks_off, {"ulysses": 2}, "has been removed"),
    "the gather taken off": (take_the_gather_off, {"ring": 2}, "has been removed"),
    "forward put back": (forget_our_forward, {"ulysses": 2}, "attention modules .* ran on a split sequence"),
    "one forward put back": (forget_one_forward, {"ring": 2}, "2 attention modules .* computed 1"),
    "a processor of its own": (attend_elsewhere, {"ulysses": 2}, "doesn't call torch's scaled_dot_product_attention"),
    "a fused feed-forward": (fuse_the_feed_forward, {"tp": 2}, "ran without its row-parallel layer"),
}


def sabotaged(mesh, case, spoil):
    pipe = scripted(layers=2)
    mc.parallelize(pipe, mesh)
    spoil(pipe.transformer)
    try:
        pipe(rule=two, generator=torch.Generator().manual_seed(0))
    except UnsupportedError as error:
        return str(error)
    return None


@pytest.mark.parametrize("case", SABOTAGE)
def test_a_model_whose_seam_was_bypassed(run_on, case):
    spoil, degrees, words = SABOTAGE[case]
    for told in run_on(sabotaged, case, spoil, **degrees):
        assert told is not None
        with pytest.raises(UnsupportedError, match=words):
            raise UnsupportedError(told)


def test_the_error_names_the_library_and_its_versions(run_on):
    spoil, degrees, _ = SABOTAGE["forward put back"]
    for told in run_on(sabotaged, "", spoil, **degrees):
        assert "Installed is diffusers" in told
        assert "tested: 0." in told


def calls_forward(step, branch, latents):
    """A pipeline that calls ``transformer.forward``: neither guidance nor hooks see it."""
    pipe = branch.__closure__
    model = next(cell.cell_contents for cell in pipe if hasattr(cell.cell_contents, "transformer")).transformer
    return model.forward(latents, torch.full((len(latents),), 500), embeds(len(latents), 5, 32), return_dict=False)[0]


@pytest.mark.parametrize("degrees", [{"cfg": 2}, {"ulysses": 2}], ids=str)
def test_a_pipeline_that_goes_round_its_denoiser(run_on, degrees):
    def error(mesh):
        pipe = mc.parallelize(scripted(), mesh)
        with pytest.raises(UnsupportedError, match="made 6 scheduler steps and 0 denoiser calls"):
            pipe(rule=calls_forward, generator=torch.Generator().manual_seed(0))
        return True

    assert all(run_on(error, **degrees))


def test_a_pipeline_made_of_a_split_ones_components_is_split(run_on):
    """``from_pipe``: guidance is shared out there too."""

    def rows(mesh):
        import diffusers

        pipe, arguments = build("sd3")
        expected = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
        mc.parallelize(pipe, mesh)
        other = diffusers.StableDiffusion3Pipeline.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        counts = []
        pipe.transformer.pos_embed.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
        found = other(**arguments, generator=torch.Generator().manual_seed(0)).images
        return float((found - expected).abs().max() / expected.abs().max()), sum(counts)

    for error, count in run_on(rows, cfg=2):
        assert error < 1e-5
        assert count == 2 + 1 + 1 + 1  # the first step whole, its trial, and one row in each of the others
