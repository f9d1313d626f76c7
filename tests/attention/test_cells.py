"""Random cells on real ranks against float64 attention on one card."""

import random

import pytest
from cells import assert_exact, check, random_cell


@pytest.mark.parametrize("degrees", [{"ring": 2}, {"ulysses": 2}], ids=str)
def test_random_cells(run_on, degrees):
    ranks = 2
    rng = random.Random(0)
    cells = [random_cell(rng, ranks) for _ in range(100)]
    assert_exact(run_on(check, cells, **degrees), cells)
