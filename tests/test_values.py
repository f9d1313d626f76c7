"""Whole numbers and misspelt names."""

import numpy as np
import pytest

from multicard.values import did_you_mean, is_whole


@pytest.mark.parametrize(
    ("value", "limits", "fits"),
    [
        (3, (), True), (3, (3, 3), True), (2, (3,), False), (4, (None, 3), False), (np.int64(3), (1,), True),
        (True, (), False), (3.0, (), False), ("3", (), False), (None, (), False), (-1, (), True),
    ],
)  # fmt: skip
def test_whole_numbers(value, limits, fits):
    assert is_whole(value, *limits) is fits


def test_misspelt_names():
    assert did_you_mean("ulises", ["tp", "ulysses"]) == "; did you mean 'ulysses'?"
    assert did_you_mean("zzz", ["tp", "ulysses"]) == ""
