"""Autoencoders by rows of pictures on 2, 3 and 4 ranks against one process: every class of diffusers, odd heights."""

import autoencoders
import pytest
import torch

import multicard as mc
from multicard.integrations.diffusers.rows import split_by_rows


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
    return found, dict(split_by_rows(model).whole)


@pytest.mark.parametrize("name", sorted(autoencoders.AUTOENCODERS))
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_autoencoders_are_exact(run_on, name, ranks):
    for errors, whole in run_on(halves, name, 5, ring=ranks):
        assert all(error < 1e-5 for error in errors.values()), errors
        assert whole == {}
