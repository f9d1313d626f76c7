"""Pipelines with their text encoders split over all ranks of a replica, against one process."""

import functools

import pytest
import torch

import more_pipelines  # noqa: F401  registers its families
import multicard as mc
import text_pipelines
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
