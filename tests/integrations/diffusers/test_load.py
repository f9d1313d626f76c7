"""Denoisers read slice by slice: the same model as the whole one split, out of fewer bytes."""

import pathlib

import pytest
import torch

import multicard as mc
from multicard.integrations.diffusers.load import outline_denoiser
from multicard.integrations.diffusers.tensor import is_split
from multicard.integrations.parallelize import parallelize
from pipelines import build, sample


def loaded(mesh, folder, names):
    found = {}
    for name in names:
        pipe, arguments = build(name)
        expected = sample(pipe, arguments)
        whole = sum(p.numel() * p.element_size() for p in pipe.transformer.parameters())
        outline = outline_denoiser(type(pipe.transformer), pathlib.Path(folder) / name, mesh)
        model, report = outline.model, outline.read()
        pipe.register_modules(transformer=model)
        parallelize(pipe, mesh)  # which leaves its weights as they are
        got = sample(pipe, arguments)
        found[name] = (
            float((got - expected).abs().max() / expected.abs().max()),
            report.bytes_read / whole,
            is_split(model) and not any(p.is_meta for p in model.parameters()),
        )
    return found


@pytest.mark.seam
@pytest.mark.parametrize("tp", [2])
def test_each_rank_reads_its_own_slices(run_on, tmp_path, tp):
    names = ["dit", "sd3", "flux2", "wan", "ltx"]
    for name in names:
        build(name)[0].transformer.save_pretrained(tmp_path / name)
    for found in run_on(loaded, str(tmp_path), names, tp=tp):
        for name, (error, share, ready) in found.items():
            assert ready, name
            assert error < 1e-5, name
            assert share < 0.95, (name, share)


def bfloat16(mesh, folder):
    outline = outline_denoiser(type(build("wan")[0].transformer), pathlib.Path(folder), mesh, torch.bfloat16)
    outline.read()
    return {name: parameter.dtype for name, parameter in outline.model.named_parameters()}


@pytest.mark.seam
def test_some_modules_stay_in_float32(run_on, tmp_path):
    build("wan")[0].transformer.save_pretrained(tmp_path)
    dtypes = run_on(bfloat16, str(tmp_path), tp=2)[0]
    assert dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert dtypes["condition_embedder.time_embedder.linear_1.weight"] == torch.float32


def test_a_mesh_without_tp_splits_no_weights(tmp_path):
    assert not is_split(mc.parallelize(build("dit")[0], mc.single()).transformer)
