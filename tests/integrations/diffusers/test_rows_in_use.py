"""Autoencoders by rows as pipelines use them: half types, modes of torch, tiles, copies, refusals."""

import copy

import diffusers
import pytest
import torch

import autoencoders
import multicard as mc
import unets
from multicard.errors import MismatchError, UnsupportedError
from multicard.integrations.diffusers.rows import split_by_rows


def tiny(sample_size=32, **changes):
    """Three levels, so that 64 rows of pixels make tiles."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16), norm_num_groups=4, latent_channels=4, sample_size=sample_size, **blocks
    ).eval()


def latents(rows=13, batch=1):
    return torch.randn(batch, 4, rows, 6, generator=torch.Generator().manual_seed(1))


def error(got, expected):
    return float((got.float() - expected.float()).abs().max() / expected.abs().max())


def modes(mesh):
    found = {}
    z = latents()
    for name, mode in (("grad", torch.enable_grad), ("no grad", torch.no_grad), ("inference", torch.inference_mode)):
        with mode():
            vae = tiny()
            expected = vae.decode(z).sample
            pixels = vae.encode(expected).latent_dist.mean
            mc.parallelize(vae, mesh)
            got = vae.decode(z).sample
            found[name] = error(got, expected), error(vae.encode(expected).latent_dist.mean, pixels)
            found[name, "carries a gradient"] = float(got.requires_grad)
    return found


def test_modes_of_torch(run_on):
    for found in run_on(modes, ulysses=2):
        assert all(each < 1e-5 for key, each in found.items() if isinstance(key, tuple)), found
        assert all(max(each) < 1e-5 for key, each in found.items() if isinstance(key, str)), found


def half(mesh, dtype):
    vae = tiny()
    exact = vae.decode(latents()).sample
    vae = vae.to(dtype)
    alone = vae.decode(latents().to(dtype)).sample
    mc.parallelize(vae, mesh)
    got = vae.decode(latents().to(dtype)).sample
    assert got.dtype == dtype
    return error(got, exact), error(alone, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_as_good_as_one_process(run_on, dtype):
    for got, alone in run_on(half, dtype, ring=3):
        assert got < 1.5 * alone
        assert got < 3e-2


def in_any_place(mesh):
    vae, z = tiny(), latents()
    expected = vae.decode(z).sample
    mc.parallelize(vae, mesh)
    mc.parallelize(vae, mesh)  # again: nothing more
    return error(vae.decode(z).sample, expected), error(copy.deepcopy(vae).decode(z).sample, expected)


@pytest.mark.parametrize("degrees", [{"cfg": 2}, {"tp": 3}, {"cfg": 2, "ring": 2}, {"dp": 2, "ulysses": 2}], ids=str)
def test_all_ranks_of_a_replica_share_the_rows(run_on, degrees):
    assert all(max(errors) < 1e-5 for errors in run_on(in_any_place, **degrees))


TILED = ("kl", "wan", "cogvideox", "hunyuan_video", "ltx")


def tiles(mesh, name):
    """With tiles, and one sample after the other."""
    found = {}
    case = autoencoders.AUTOENCODERS[name]
    for how in ("enable_tiling", "enable_slicing"):
        torch.manual_seed(0)
        vae = case.build()
        getattr(vae, how)()
        if how == "enable_tiling":
            smaller(vae)
        expected = autoencoders.decode(vae, case, 12)
        mc.parallelize(vae, mesh)
        found[how] = error(autoencoders.decode(vae, case, 12), expected), split_by_rows(vae) is not None
    return found


def smaller(vae):
    """Tiles that are smaller than the pictures of these tests."""
    for name, value in vars(vae).items():
        if name.startswith("tile_") and isinstance(value, int) and "frames" not in name and "num" not in name:
            setattr(vae, name, 16 if "min" in name else 12 if "stride" in name else 8)


@pytest.mark.parametrize("name", TILED)
def test_tiles_and_slices_are_those_of_one_process(run_on, name):
    for found in run_on(tiles, name, ring=2):
        assert all(each < 1e-5 and split for each, split in found.values()), found


def other_latents(mesh):
    vae = mc.parallelize(tiny(), mesh)
    vae.decode(latents() + mesh.rank)


def test_ranks_with_other_latents_are_told(run_on):
    with pytest.raises(MismatchError, match=r"a call of AutoencoderKL\.decoder.*argument 0"):
        run_on(other_latents, ring=2)


def compiled(mesh):
    vae = mc.parallelize(tiny(), mesh)
    vae.decoder.compile(backend="eager")
    with pytest.raises(UnsupportedError, match=r"torch.compile of AutoencoderKL.decoder"):
        vae.decode(latents())
    vae = tiny()
    vae.decoder.mid_block.compile(backend="eager")
    with pytest.raises(UnsupportedError, match=r"torch.compile of AutoencoderKL.decoder.mid_block"):
        mc.parallelize(vae, mesh)
    vae = mc.parallelize(tiny(), mesh)
    with pytest.raises(UnsupportedError, match=r"torch.compile of AutoencoderKL.decoder"):
        torch.compile(vae.decode, backend="eager")(latents())


def test_compiled_ones_are_refused(run_on):
    run_on(compiled, ring=2)


def audio(mesh):
    with pytest.raises(UnsupportedError, match="AutoencoderOobleck has no convolutions over rows"):
        mc.parallelize(diffusers.AutoencoderOobleck(8, [2], [1, 2], 8, 4), mesh)


def test_audio_is_refused_by_name(run_on):
    run_on(audio, ring=2)


def cached_unet(mesh):
    torch.manual_seed(0)
    model = mc.parallelize(unets.UNETS["sd15"].build(), mesh)
    callback = {"current_timestep_callback": lambda: 500}
    diffusers.apply_pyramid_attention_broadcast(
        model, diffusers.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, **callback)
    )
    with pytest.raises(UnsupportedError, match="keeps state from step to step"):
        unets.forward(model, unets.UNETS["sd15"], 8)


def test_a_cache_that_is_put_on_a_split_unet_is_refused(run_on):
    run_on(cached_unet, ulysses=2)
