"""The support matrix is what the tests ran, and the page says the same."""

import pytest
from cells import assert_exact, attend_on, check, inputs
from features import MESHES, PAGE, cells_for, table

import multicard as mc


@pytest.mark.parametrize("schedule", MESHES)
def test_every_pair_of_features_is_exact(run_on, schedule):
    cells = cells_for(schedule, refused=False)
    assert len(cells) > 200
    assert_exact(run_on(check, cells, **MESHES[schedule]), cells)


@pytest.mark.parametrize("schedule", MESHES)
def test_what_is_refused_is_refused_with_the_reason(schedule):
    cells = cells_for(schedule, refused=True)
    assert cells
    for cell in cells:
        with pytest.raises(mc.errors.UnsupportedError, match="causal with joint"):
            attend_on(mc.single(), cell, inputs(cell))


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == table(), "run `python tests/attention/features.py`"
