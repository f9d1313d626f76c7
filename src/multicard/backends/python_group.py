"""What ``torch.distributed`` asks of every process group, for those that are written in Python."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist

from multicard.errors import UnsupportedError

# torch's stubs spell every way to call each method; here are those that torch.distributed and its C++ side use
# mypy: disable-error-code="override, assignment"


class PythonGroup(dist.ProcessGroup):
    """A process group for CPU tensors that knows its place, name and description.

    Attributes:
        backend: what it is registered as.
    """

    backend: ClassVar[str]
    counts_collectives_alone = True  # a sequence number is the same on all ranks, whatever messages they have sent
    supports_coalescing = False  # batch_isend_irecv then starts one message at a time, which never blocks

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._place = (rank, size)
        self._names = {"name": "", "desc": ""}

    def _get_backend(self, device: torch.device) -> Any:
        if torch.device(device).type != "cpu":
            raise UnsupportedError(f"backend {self.backend} is for CPU tensors, not {device}")
        return self

    def getBackendName(self) -> str:  # noqa: N802
        return self.backend

    name = getBackendName

    def getRank(self) -> int:  # noqa: N802
        return self._place[0]

    def getSize(self) -> int:  # noqa: N802
        return self._place[1]

    rank, size = getRank, getSize

    def setGroupName(self, name: str) -> None:  # noqa: N802
        self._names["name"] = name

    def getGroupName(self) -> str:  # noqa: N802
        return self._names["name"]

    def setGroupDesc(self, desc: str) -> None:  # noqa: N802
        self._names["desc"] = desc

    def getGroupDesc(self) -> str:  # noqa: N802
        return self._names["desc"]

    _set_group_name, _set_group_desc = setGroupName, setGroupDesc
    group_name, group_desc = property(getGroupName), property(getGroupDesc)
