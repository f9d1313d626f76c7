"""The styles of a ``transformers`` plan: the common ones, and those that only this library needs."""

from __future__ import annotations

from torch import nn

from multicard.integrations import styles
from multicard.integrations.rest import gathered
from multicard.integrations.styles import Change, Context, Style, cut_parameter
from multicard.integrations.transformers.experts import experts


def head_columns(module: nn.Module, context: Context) -> Change:
    """Split a table that has a column for every query head (position biases)."""
    mine = context.heads.query_shares(module.get_parameter("weight").shape[1])[context.axis.rank]
    return lambda: cut_parameter(module, "weight", 1, mine)


STYLES: dict[str, Style] = {
    **styles.STYLES,
    "head_columns": head_columns,
    "experts": experts,
    "gathered": gathered,
    "embedding": styles.whole,
    "head": styles.whole,
}
"""By name. Embeddings and output heads are split by their role (see ``vocabulary``), whatever their style is."""
