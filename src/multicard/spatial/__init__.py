"""Rows of a convolutional network over the ranks of an axis, exactly: any network of torch, unmodified."""

from multicard.spatial import (  # noqa: F401  rules
    convolution,
    interpolation,
    norms,
    padding,
    pointwise,
    products,
    reductions,
    views,
    weights,
)
from multicard.spatial.rows import NewRows, Rows, Split, split_rows

__all__ = ["NewRows", "Rows", "Split", "split_rows"]
