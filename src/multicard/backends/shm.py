"""Backend "shm": ``torch.distributed`` for CPU ranks of one host, through shared memory.

    import multicard.backends.shm
    dist.init_process_group("cpu:shm")

Importing registers it. Nothing of multicard's launcher is needed: it works under ``torchrun`` and ``mp.spawn``.
docs/shm.md has what it does, what it costs and what it refuses.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from multicard.backends.shm_group import ShmProcessGroup

__all__ = ["ShmProcessGroup"]


def _create(options: Any, _: object) -> ShmProcessGroup:
    return ShmProcessGroup(
        options.store, options.group_rank, options.group_size, options.timeout, options.global_ranks_in_group
    )


if "shm" not in dist.Backend.backend_list:
    dist.Backend.register_backend("shm", _create, extended_api=True, devices=["cpu"])
