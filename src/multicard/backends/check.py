"""Backend "checked_gloo", registered on import: gloo with a check before each collective.

gloo itself moves bytes without comparing sizes and types: different dtypes, reductions or orders give garbage without
an error, and different lengths abort the process. The shm backend has the same check built in.
"""

from multicard.backends.gloo import GlooGroup
from multicard.backends.process_group import ProcessGroup, register


class CheckedGloo(ProcessGroup):
    """A :class:`~multicard.backends.gloo.GlooGroup` as a process group of ``torch.distributed``."""

    backend = "checked_gloo"


register(CheckedGloo, GlooGroup)
