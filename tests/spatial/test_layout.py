"""Which rows each rank holds before and after an operation: properties of pure functions."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from multicard.spatial.layout import Layout, TransposedWindow, Window, inside, reshaped

CUTS = st.lists(st.integers(0, 12), min_size=1, max_size=4).map(lambda cuts: (0, *sorted(cuts)))
WINDOWS = st.builds(Window, st.integers(1, 5), st.integers(1, 3), st.integers(0, 3), st.integers(1, 2))


@given(CUTS, WINDOWS)
def test_a_windows_rows_are_divided_once_and_read_what_torch_reads(cuts, window):
    out = window.cuts(cuts)
    rows = window.rows(cuts[-1])
    assert (out[0], out[-1], list(out)) == (0, rows, sorted(out))
    for row in range(rows):
        first = row * window.stride - window.padding
        assert window.reads(range(row, row + 1)) == range(first, first + window.extent)
    if rows and cuts[-1]:
        x = torch.ones(1, 1, cuts[-1])
        weight = torch.ones(1, 1, window.kernel)
        assert torch.conv1d(x, weight, None, window.stride, window.padding, window.dilation).shape[-1] == rows


@given(CUTS, st.integers(1, 5), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2))
def test_a_transposed_windows_rows_read_all_that_adds_to_them(cuts, kernel, stride, padding, dilation):
    window = TransposedWindow(kernel, stride, padding, dilation)
    rows = window.rows(cuts[-1])
    if kernel < stride or rows < 1:
        return
    out = window.cuts(cuts)
    assert (out[0], out[-1]) == (0, rows)
    for row in range(rows):
        adding = [
            i for i in range(cuts[-1]) for n in range(kernel) if i * stride - padding + n * dilation == row
        ]  # by definition
        read = inside(window.reads(range(row, row + 1)), cuts[-1])
        assert set(adding) <= set(read)


@given(CUTS, st.integers(1, 3), st.data())
def test_a_reshape_keeps_each_number_on_its_rank(cuts, outer, data):
    before, after = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    layout = Layout(1, cuts, outer)
    shape = (before, outer * cuts[-1], after)
    factors = [n for n in (before, outer, cuts[-1], after) if n > 1]
    groups = data.draw(st.lists(st.integers(0, 3), min_size=len(factors), max_size=len(factors)).map(sorted))
    new = tuple(math.prod(f for f, g in zip(factors, groups, strict=True) if g == i) for i in range(4))
    found = reshaped(layout, shape, new)
    if found is None or found[1] != 1:
        return
    whole = torch.arange(math.prod(shape)).view(shape)
    for rank in range(len(cuts) - 1):
        mine = part(whole, layout, rank).reshape(found[0].shape(new, rank))
        assert torch.equal(mine, part(whole.view(new), found[0], rank))


def part(whole, layout, rank):
    """By indexing."""
    rows = [o * layout.rows + i for o in range(layout.outer) for i in layout.spans[rank]]
    return whole.index_select(layout.dim, torch.tensor(rows, dtype=torch.long))
