"""Autoencoders and U-Nets by rows of pictures against one process: every class of diffusers, odd heights.

docs/spatial.md shows what this finds.
"""

import os
import pathlib
import re

import pytest
import torch

import autoencoders
import multicard as mc
import unets
from multicard.integrations.diffusers.rows import RowSplit, split_by_rows

WHOLE = {  # what is computed whole: pictures turned to tokens with others beside them, odd rows pooled by twos
    "minimax_h3": {"slice", "cat"},
    "rae": {"select"},
    "i2vgen": {"_adaptive_avg_pool2d"},
    **{f"t2i-{kind}": {"avg_pool2d"} for kind in ("full_adapter", "full_adapter_xl", "light_adapter")},
}


PAGE = pathlib.Path(__file__).parents[3] / "docs" / "spatial.md"


@pytest.fixture(scope="session")
def matrix():
    """By name: the class, what was compared, and what was computed whole."""
    return {}


def halves(mesh, name, rows):
    """Relative errors of decode and encode, and the operations that were computed whole."""
    case = autoencoders.AUTOENCODERS[name]
    torch.manual_seed(0)
    model = case.build()
    calls = [autoencoders.decode, *([autoencoders.encode] if case.encode else [])]
    expected = [call(model, case, rows) for call in calls]
    mc.parallelize(model, mesh)
    found = {}
    for call, wanted in zip(calls, expected, strict=True):
        got = call(model, case, rows)
        assert type(got) is torch.Tensor
        found[call.__name__] = float((got - wanted).abs().max() / wanted.abs().max())
    return type(model).__name__, found, dict(split_by_rows(model).whole)


@pytest.mark.parametrize("name", sorted(autoencoders.AUTOENCODERS))
@pytest.mark.parametrize("ranks", [3, *(pytest.param(n, marks=pytest.mark.soak) for n in (2, 4))])
def test_autoencoders_are_exact(run_on, matrix, name, ranks):
    for kind, errors, whole in run_on(halves, name, 5, ring=ranks):
        matrix[name] = kind, errors, whole
        assert all(error < 1e-5 for error in errors.values()), errors
        assert {*whole} == WHOLE.get(name, set())


def unet(mesh, name, rows):
    """Relative error of a forward, and the operations that were computed whole."""
    case = unets.UNETS[name]
    torch.manual_seed(0)
    model = case.build()
    rows += -rows % case.multiple
    expected = unets.forward(model, case, rows)
    if mesh.tp.size > 1:
        mc.parallelize(model, mesh)
    else:  # also networks that are no denoisers
        RowSplit(model, mesh)
    got = unets.forward(model, case, rows)
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True)]
    return type(model).__name__, {"forward": max(errors)}, dict(split_by_rows(model).whole)


@pytest.mark.parametrize("name", sorted(unets.UNETS))
@pytest.mark.parametrize(
    "degrees",
    [
        {"ring": 3},
        *(pytest.param(each, marks=pytest.mark.soak) for each in ({"ulysses": 2}, {"ring": 2, "ulysses": 2})),
    ],
    ids=str,
)
def test_unets_are_exact(run_on, matrix, name, degrees):
    for kind, errors, whole in run_on(unet, name, 7, **degrees):
        matrix[name] = kind, errors, whole
        assert errors["forward"] < 1e-5
        assert {*whole} == WHOLE.get(name, set())


def test_the_page_shows_this_table(matrix):
    names = [*sorted(autoencoders.AUTOENCODERS), *sorted(unets.UNETS)]
    if set(matrix) != set(names):
        pytest.skip("needs the outcomes of all models")
    lines = ["| | class | exact | computed whole |", "|---|---|---|---|"]
    for name in names:
        kind, errors, whole = matrix[name]
        lines.append(f"| {name} | `{kind}` | {', '.join(errors)} | {', '.join(sorted(whole)) or '–'} |")
    table, page = "\n".join(lines) + "\n", PAGE.read_text()
    shown = re.search(r"<!-- matrix -->\n(.*?)<!-- end -->", page, re.S)
    assert shown, "docs/spatial.md has no <!-- matrix --> ... <!-- end -->"
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(page[: shown.start(1)] + table + page[shown.end(1) :])
    else:
        assert shown[1] == table, "run UPDATE_DOCS=1 pytest tests/integrations/diffusers/test_rows_of_models.py"


@pytest.mark.parametrize("name", ["sd15", "sdxl", "motion", "svd"])
def test_unets_by_rows_and_by_weights(run_on, name):
    for _, errors, whole in run_on(unet, name, 7, ulysses=2, tp=2):
        assert errors["forward"] < 1e-5
        assert whole == {}
