"""Which schedule to use: Ulysses, ring or hybrid, decided from sizes alone, and the reason for it."""

from __future__ import annotations

import dataclasses

from multicard import partition
from multicard.attention.checks import check_name
from multicard.axis import Axis
from multicard.mesh import ParallelMesh

SCHEDULES = ("auto", "ulysses", "ring", "hybrid")
WORTH_LEAVING = 0.95
"""Another schedule replaces the mesh's own if its slowest rank has less than this fraction of the work."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A decision.

    Attributes:
        name: "local", "ulysses", "ring" or "hybrid".
        why: the reason, as text.
    """

    name: str
    why: str

    def axes(self, mesh: ParallelMesh) -> tuple[Axis, Axis]:
        """The ring and the Ulysses axis to use. Sequence rank s has ranks ``divmod(s, ulysses.size)`` on them."""
        ring, ulysses = Axis("ring", 0, 1), Axis("ulysses", 0, 1)
        if self.name == "ring":
            return mesh.sequence, ulysses
        if self.name == "ulysses":
            return ring, mesh.sequence
        return (mesh.ring, mesh.ulysses) if self.name == "hybrid" else (ring, ulysses)


def choose_schedule(
    mesh: ParallelMesh,
    *,
    heads: int,
    kv_heads: int,
    seq_len: int,
    kv_seq_len: int | None = None,
    causal: bool = False,
    order: str = "contiguous",
    masked: bool = False,
    replicated_kv: bool = False,
    schedule: str = "auto",
) -> Schedule:
    """How :func:`attend` will compute a call of these sizes on this mesh, and why; the same on every rank.

    "auto" uses the mesh's own axes, unless heads or rows divide so unevenly over them that another schedule gives the
    slowest rank at least a twentieth less work. With a mask whose rows are sharded it uses the ring, which doesn't move
    them.

    Args:
        heads, kv_heads: on this rank. seq_len, kv_seq_len: of the whole sequence.
        masked: a ``mask`` (not a ``key_mask``) is given.
        schedule: "auto", or the schedule to use.

    Raises:
        ConfigError: an unknown schedule.
    """
    check_name("schedule", schedule, SCHEDULES)
    if mesh.sequence.size == 1:
        return Schedule("local", "one rank holds the sequence")
    if replicated_kv:
        return Schedule("local", "every rank holds all keys and values: nothing to exchange")
    if schedule != "auto":
        return Schedule(schedule, "asked for")
    if masked:
        return Schedule("ring", "a mask's rows stay where they are; Ulysses would gather them")
    keys = seq_len if kv_seq_len is None else kv_seq_len
    own = "hybrid" if mesh.ring.size > 1 < mesh.ulysses.size else "ring" if mesh.ring.size > 1 else "ulysses"
    names = [own, *(name for name in ("ulysses", "hybrid", "ring") if name != own)]
    loads = {name: _slowest(name, mesh, heads, kv_heads, seq_len, keys, causal, order) for name in names}
    best = min(names, key=lambda name: loads[name])
    if best == own or loads[best] >= WORTH_LEAVING * loads[own]:
        return Schedule(own, f"the mesh's own axes; its slowest rank does {loads[own]:.2f} of an even share")
    return Schedule(
        best,
        f"its slowest rank does {loads[best]:.2f} of an even share, that of {own}, the mesh's own, {loads[own]:.2f}",
    )


def _slowest(
    name: str, mesh: ParallelMesh, heads: int, kv_heads: int, seq_len: int, keys: int, causal: bool, order: str
) -> float:
    """The slowest rank's work, relative to an even split."""
    ring, ulysses = Schedule(name, "").axes(mesh)
    most_heads = max(len(share.query) for share in partition.split_heads(heads, kv_heads, ulysses.size))
    slices = partition.split_sequence(seq_len, mesh.sequence.size, order)
    groups = [slices[i * ulysses.size : (i + 1) * ulysses.size] for i in range(ring.size)]
    seen = [sum(_keys_seen(span, keys - seq_len, keys, causal) for part in group for span in part) for group in groups]
    return mesh.sequence.size * most_heads / heads * max(seen) / max(1, sum(seen))


def _keys_seen(rows: range, offset: int, keys: int, causal: bool) -> int:
    """Scores that these query positions need, ``offset`` being the position of the first query."""
    if not causal:
        return len(rows) * keys
    some = range(max(rows.start, -offset), rows.stop)
    return len(some) * (some.start + some.stop + 1 + 2 * offset) // 2
