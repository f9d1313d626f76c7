"""What a ``transformers`` plan may say of a module: the common styles, and those that only this library needs."""

from __future__ import annotations

from torch import nn

from multicard.integrations import styles
from multicard.integrations.styles import Change, Context, Style, cut_parameter
from multicard.integrations.transformers.experts import experts


def head_columns(module: nn.Module, context: Context) -> Change:
    """A table with a column for every query head (position biases)."""
    mine = context.heads.query_shares(module.get_parameter("weight").shape[1])[context.axis.rank]
    return lambda: cut_parameter(module, "weight", 1, mine)


STYLES: dict[str, Style] = {
    **styles.STYLES,
    "head_columns": head_columns,
    "experts": experts,
    "embedding": styles.whole,
    "head": styles.whole,
}
"""By name. The vocabulary's own modules are split by their role (see ``vocabulary``), whatever a plan says of them."""
