"""Backend "shm": ``torch.distributed`` for CPU ranks of one host, through shared memory.

    import multicard.backends.shm
    dist.init_process_group("cpu:shm")

Importing registers it. Nothing of multicard's launcher is needed: it works under ``torchrun`` and ``mp.spawn``.
docs/shm.md has what it does, what it costs and what it refuses.
"""

from multicard.backends.shm.process_group import ShmProcessGroup

__all__ = ["ShmProcessGroup"]
