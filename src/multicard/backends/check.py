"""Backend "checked_gloo", registered on import: gloo, whose ranks first agree on what they are about to do.

gloo itself moves bytes of whatever sizes and types meet: different dtypes, reductions or orders give garbage in
silence, and different lengths abort the process. The shm backend has the same check built in.
"""

from multicard.backends.gloo import GlooGroup
from multicard.backends.process_group import ProcessGroup, register


class CheckedGloo(ProcessGroup):
    """A :class:`~multicard.backends.gloo.GlooGroup` as ``torch.distributed`` knows it."""

    backend = "checked_gloo"


register(CheckedGloo, GlooGroup)
