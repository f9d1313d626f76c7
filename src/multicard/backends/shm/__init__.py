"""Backend "shm": ``torch.distributed`` for CPU ranks of one host, through shared memory.

    import multicard.backends.shm
    dist.init_process_group("cpu:shm")

Importing this module registers it. It doesn't need multicard's launcher: it works under ``torchrun`` and ``mp.spawn``.
docs/shm.md describes what it does, costs and refuses.
"""

from multicard.backends.shm.process_group import ShmProcessGroup

__all__ = ["ShmProcessGroup"]
