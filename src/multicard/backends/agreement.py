"""The check of collectives: before data moves, ranks compare what each of them calls, from where, with which splits.

Each rank's record goes through one all-gather of the group's own: exchange windows in shm, gloo's in gloo.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from multicard.backends.calls import CALL_WORDS, CALLS, SAME_SHAPE, SYMMETRIC, Call, describe, sites
from multicard.errors import MismatchError

TEXT = 512
"""Bytes of a record for the call site and the shape; longer text loses its start."""


class Agreement:
    """Compares the calls of one group's ranks.

    Args:
        ranks: every rank's global rank, for messages.

    Attributes:
        axis: the group's mesh axis, for messages; "" for other groups.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self.axis, self._ranks, self._size = "", tuple(ranks), len(ranks)
        self._record = struct.Struct(f"={CALL_WORDS + 1}q{2 * self._size}q{TEXT}s")
        self._mine, self._all = bytearray(self._record.size), bytearray(self._record.size * self._size)
        with torch.inference_mode(False):  # also used outside an inference mode in which the group may be made
            self._row = torch.frombuffer(self._mine, dtype=torch.uint8)
            self._rows = torch.frombuffer(self._all, dtype=torch.uint8).view(self._size, -1)

    def find_mismatch(
        self,
        all_gather: Callable[[Tensor, Tensor], object],
        number: int,
        call: Call,
        x: Tensor | None,
        sent: Sequence[int],
        received: Sequence[int],
    ) -> MismatchError | None:
        """Compare all ranks' calls; every rank gets the error to raise if they differ. One all-gather.

        An operation with a root may be called from different lines, as the root and the others often do.

        Args:
            all_gather: fills the rows of its first argument, ``(ranks, bytes)``, with every rank's second.
            number: of the call in this group, for messages.
            call: the part of the call that must be the same on all ranks.
            x: this rank's tensor; its shape is compared if the operation needs the same shape on all ranks.
            sent: elements for each rank; what rank i sends to j must be what j receives from i. Empty: none.
            received: elements from each rank.
        """
        name, size = CALLS[call[0]], self._size
        site, where = sites() if name in SYMMETRIC else (0, "")
        where = f" at {where}" if where else ""
        if x is not None and name in SAME_SHAPE:
            where = f" of shape {tuple(x.shape)}{where}"
        splits = (*sent, *received) or (0,) * 2 * size
        self._record.pack_into(self._mine, 0, *call, site, *splits, where.encode()[-TEXT:])
        all_gather(self._rows, self._row)
        if not sent and self._all == self._mine * size:
            return None
        rows = list(self._record.iter_unpack(self._all))
        sends = [row[CALL_WORDS + 1 : -1 - size] for row in rows]
        takes = [row[-1 - size : -1] for row in rows]
        said = [(*row[: CALL_WORDS + 1], row[-1]) for row in rows]
        if said.count(said[0]) == size and sends == list(zip(*takes, strict=True)):
            return None
        return self._disagreement(number, said, sends, takes)

    def _disagreement(
        self,
        number: int,
        said: Sequence[tuple],
        sends: Sequence[tuple[int, ...]],
        takes: Sequence[tuple[int, ...]],
    ) -> MismatchError:
        calls = []
        for (*call, _, where), sent, received in zip(said, sends, takes, strict=True):
            splits = f" sending {list(sent)} and receiving {list(received)}" if any(sent + received) else ""
            calls.append(f"{describe(call)}{splits}{where.rstrip(bytes(1)).decode(errors='replace')}")
        odd = min(range(len(calls)), key=lambda i: (calls.count(calls[i]), -i))
        text = "; ".join(f"rank {rank} calls {call}" for rank, call in zip(self._ranks, calls, strict=True))
        of_axis = f" of {self.axis}" if self.axis else ""
        return MismatchError(
            f"ranks disagree about collective number {number}{of_axis}: {text}",
            rank=self._ranks[odd],
            collective=CALLS[said[odd][0]],
            sequence_number=number,
        )
