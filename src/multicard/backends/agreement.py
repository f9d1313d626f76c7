"""Ranks agree on what they are about to do: one all-gather of a short record of it, by gloo."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from multicard.backends.calls import ROOTED, sites
from multicard.errors import MismatchError

RECORD = 512
"""Bytes for a description, and as many for a call site; what is cut off is the start."""


class Agreement:
    """What a group's ranks compare before each collective.

    Args:
        group: where the records are exchanged.
        ranks: the group's ranks, for messages.

    Attributes:
        calls: how many collectives this rank has entered.
        axis: the group's mesh axis, for messages; "" for other groups.
    """

    def __init__(self, group: dist.ProcessGroup, ranks: Sequence[int]) -> None:
        self.calls = 0
        self.axis = ""
        self._group, self._ranks = group, tuple(ranks)

    def reach(self, call: str, sent: Sequence[int] = (), received: Sequence[int] = ()) -> None:
        """Compare ``call``, and where it is called, with everybody's. One all-gather.

        An operation with a root may be called from different lines, as roots and others often do.

        Args:
            call: the operation with what must be the same on all ranks.
            sent: elements for each rank; what rank i sends to j must be what j receives from i.
            received: elements from each rank.

        Raises:
            MismatchError: ranks differ; on every rank.
        """
        self.calls += 1
        size = len(self._ranks)
        number, line = sites() if not call.startswith(ROOTED) else (0, "")
        words = torch.zeros(2 * size + 1, dtype=torch.int64)
        words[0] = number
        words[1 : 1 + len(sent)] = torch.tensor(sent, dtype=torch.int64)
        words[1 + size : 1 + size + len(received)] = torch.tensor(received, dtype=torch.int64)
        mine = torch.cat([to_record(call), to_record(line), words.view(torch.uint8)])
        everybody = torch.empty(size * mine.numel(), dtype=torch.uint8)
        self._group._allgather_base(everybody, mine).wait()
        rows = everybody.view(size, -1)
        words = rows[:, 2 * RECORD :].contiguous().view(torch.int64).view(size, -1)
        texts = rows[:, : 2 * RECORD]
        same = torch.equal(texts, texts[:1].expand_as(texts)) and bool((words[:, 0] == words[0, 0]).all())
        crossed = torch.equal(words[:, 1 : 1 + size], words[:, 1 + size :].T)
        if not same or not crossed:
            raise self._disagreement(texts, words[:, 1:])

    def _disagreement(self, texts: Tensor, splits: Tensor) -> MismatchError:
        size, calls = len(self._ranks), []
        for text, split in zip(texts, splits.tolist(), strict=True):
            call, line = from_record(text[:RECORD]), from_record(text[RECORD:])
            moved = f" sending {split[:size]} and receiving {split[size:]}" if any(split) else ""
            calls.append(call + moved + (f" at {line}" if line else ""))
        odd = min(range(size), key=lambda i: (calls.count(calls[i]), -i))
        told = "; ".join(f"rank {rank} calls {call}" for rank, call in zip(self._ranks, calls, strict=True))
        where = f" of {self.axis}" if self.axis else ""
        return MismatchError(
            f"ranks disagree about collective number {self.calls}{where}: {told}",
            rank=self._ranks[odd],
            collective=calls[odd].partition("(")[0],
            sequence_number=self.calls,
        )


def to_record(text: str) -> Tensor:
    """``text`` as ``RECORD`` bytes."""
    return torch.frombuffer(bytearray(text.encode()[-RECORD:].ljust(RECORD, b"\0")), dtype=torch.uint8)


def from_record(record: Tensor) -> str:
    """What :func:`to_record` was given."""
    return bytes(record.tolist()).rstrip(b"\0").decode(errors="replace")
