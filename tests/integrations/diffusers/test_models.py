"""Every model × technique: exact, or refused by name before anything runs. docs/diffusion.md shows this table."""

import functools
import os
import pathlib
import re

import pytest
import torch

import more_pipelines  # noqa: F401  registers its families
import multicard as mc
from multicard.errors import UnsupportedError
from pipelines import FAMILIES, build, sample

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "diffusion.md"
MESHES = {
    "cfg=2": {"cfg": 2},
    "ulysses=2": {"ulysses": 2},
    "ring=2": {"ring": 2},
    "tp=2": {"tp": 2},
    "tp=3": {"tp": 3},
    "ring=3": {"ring": 3},
    "cfg=2 ulysses=2": {"cfg": 2, "ulysses": 2},
    "ulysses=2 tp=2": {"ulysses": 2, "tp": 2},
    "cfg=2 tp=2": {"cfg": 2, "tp": 2},
}
ONLY_CFG = (  # slow, or a model that is above under another guidance
    "hidream", "guider_apg", "guider_slg", "guider_auto", "modular_wan",
)  # fmt: skip


REPEATED = ("dit", "sd3_skip_layers", "flux", "wan", "stable_diffusion", "guider_cfg")
"""Pipelines of every kind, which run twice on each mesh; where there is a cfg axis, whose second call deals branches
out by what the first did, all do."""


@pytest.fixture(scope="module")
def alone():
    """``alone(name)``: what one process has, computed once; with one thread, as the ranks have."""

    @functools.cache
    def run(name):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return sample(*build(name))
        finally:
            torch.set_num_threads(threads)

    return run


def outcomes(mesh, wanted):
    """For each pipeline its largest error relative to ``wanted``, one process's, or why it was refused."""
    found = {}
    for name, expected in wanted.items():
        pipe, arguments = build(name)
        untouched = {key: id(module) for key, module in pipe.components.items()}
        try:
            mc.parallelize(pipe, mesh)
        except UnsupportedError as error:
            assert torch.equal(sample(pipe, arguments), expected), "a refusal must leave the pipeline as it was"
            assert untouched == {key: id(module) for key, module in pipe.components.items()}
            found[name] = str(error)
            continue
        try:
            runs = [sample(pipe, arguments) for _ in range(2 if mesh.cfg.size > 1 or name in REPEATED else 1)]
        except UnsupportedError as error:
            found[name] = str(error)
            continue
        worst = max(float((run - expected).abs().max() / expected.abs().max()) for run in runs)
        found[name] = (worst, runs[-1])
    return found


def seams(label):
    return [pytest.mark.seam] if label in ("cfg=2", "ulysses=2", "tp=2") else []


@pytest.fixture(scope="session")
def matrix():
    return {}


@pytest.mark.parametrize("label", [pytest.param(label, marks=seams(label)) for label in MESHES])
def test_exact_or_refused(run_on, matrix, alone, label):
    names = [name for name in FAMILIES if name not in ONLY_CFG or label == "cfg=2"]
    by_rank = run_on(outcomes, {name: alone(name) for name in names}, **MESHES[label])
    for name, outcome in by_rank[0].items():
        others = [rank[name] for rank in by_rank[1:]]
        if isinstance(outcome, str):
            assert "use cfg" in outcome.lower(), (name, outcome)
            assert all(other == outcome for other in others), name
            matrix[name, label] = "refused"
        else:
            assert outcome[0] < 1e-5, name
            assert all(torch.equal(outcome[1], other[1]) for other in others), name
            matrix[name, label] = "exact"


def test_the_page_shows_this_table(matrix):
    if {label for _, label in matrix} != set(MESHES):
        pytest.skip("needs the outcomes of all meshes")
    rows = [f"| {name} | " + " | ".join(matrix.get((name, label), "–") for label in MESHES) + " |" for name in FAMILIES]
    table = "\n".join([f"| | {' | '.join(MESHES)} |", f"|---{'|---' * len(MESHES)}|", *rows])
    page = PAGE.read_text()
    shown = re.search(r"<!-- matrix -->\n(.*?)<!-- end -->", page, re.S)
    assert shown, "docs/diffusion.md has no <!-- matrix --> ... <!-- end -->"
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(page[: shown.start(1)] + table + "\n" + page[shown.end(1) :])
    else:
        assert shown[1] == table + "\n", "run UPDATE_DOCS=1 pytest tests/integrations/diffusers/test_models.py"


def test_three_branches_on_three_ranks(run_on, alone):
    names = ["instruct_pix2pix", "sd3_skip_layers", "guider_slg", "controlnet_heun", "modular_wan"]
    for found in run_on(outcomes, {name: alone(name) for name in names}, cfg=3):
        assert all(error < 1e-5 for error, _ in found.values()), {name: error for name, (error, _) in found.items()}


def scales(mesh, name):
    errors = []
    for scale in (1.0, 2.0, 7.5):
        key = "true_cfg_scale" if "true_cfg_scale" in build(name)[1] else "guidance_scale"
        changed = {key: scale, "num_inference_steps": 4}
        pipe, arguments = build(name, **changed)
        expected = sample(pipe, arguments)
        pipe, arguments = build(name, **changed)
        got = sample(mc.parallelize(pipe, mesh), arguments)
        errors.append(float((got - expected).abs().max() / expected.abs().max()))
    return errors


def test_any_guidance_scale(run_on):
    for name in ("dit", "sd3", "wan", "qwen_image"):
        assert max(run_on(scales, name, cfg=2)[0]) < 1e-5, name
