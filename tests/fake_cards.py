"""A card that isn't there: shapes, dtypes and devices as on one, without computing anything.

For a process of its own: torch then knows one more kind of device until the process ends.
"""

import contextlib
from unittest import mock

import torch
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from multicard.models import memory


class HostReads(TorchDispatchMode):
    """Counts what waits for the device; every number that is read is 1.

    Attributes:
        count: tensors copied to the host, and numbers read, so far.
    """

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default):
            self.count += 1
            return 1.0 if args[0].is_floating_point() else 1
        if function is torch.ops.aten._to_copy.default and str(kwargs.get("device")) == "cpu":
            self.count += args[0].device.type != "cpu"
        return function(*args, **kwargs)


@contextlib.contextmanager
def card():
    """Tensors made here are fake; yields the device and the counter of reads."""
    if torch._C._get_privateuse1_backend_name() != "card":
        _setup_privateuseone_for_python_backend("card")
    with (
        mock.patch.object(memory, "free_bytes", return_value=1 << 40),
        mock.patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", -1),  # it would compute with single numbers, or none
        fake_tensor.FakeTensorMode(),
        HostReads() as reads,
    ):
        torch._C._set_only_lift_cpu_tensors(True)  # as the mode itself does for CUDA: torch.tensor makes fakes too
        yield torch.device("card", 0), reads
