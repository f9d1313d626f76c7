"""Which attention heads each rank computes, and its features of the projections to and from these heads."""

from __future__ import annotations

import dataclasses

from multicard import partition
from multicard.axis import Axis
from multicard.errors import UnsupportedError
from multicard.layers.shard import Shares, concatenated
from multicard.partition import HeadShard

IDLE = HeadShard(range(1), range(1), ((range(1), range(1)),))
"""The heads of a rank without a head of its own: it computes head 0, with zeros as that head's output weights."""


@dataclasses.dataclass(frozen=True)
class Heads:
    """The heads of one attention module and every rank's share of them.

    Attributes:
        query, kv: how many there are.
        shards: by rank; a rank with ``idle`` set computes head 0 without effect, as modules can't take zero heads.
        rank: this rank.
    """

    query: int
    kv: int
    shards: tuple[HeadShard, ...]
    rank: int

    @classmethod
    def split(cls, query: int, kv: int, axis: Axis, *, whole_groups: bool = False) -> Heads:
        """Split query heads evenly; with ``whole_groups`` key/value heads, each with all query heads that read it."""
        shards = _whole_groups(query, kv, axis.size) if whole_groups else partition.split_heads(query, kv, axis.size)
        return cls(query, kv, shards, axis.rank)

    @property
    def mine(self) -> HeadShard:
        return self.shards[self.rank] if self.shards[self.rank].query else IDLE

    @property
    def idle(self) -> bool:
        return not self.shards[self.rank].query

    def query_shares(self, width: int) -> Shares:
        """Every rank's spans of ``width`` query features; idle ranks compute head 0."""
        return _spans([shard.query or IDLE.query for shard in self.shards], width // self.query)

    def output_shares(self, width: int) -> Shares:
        """Every rank's spans of the output projection's input features; none for idle ranks."""
        return _spans([shard.query for shard in self.shards], width // self.query)

    def kv_shares(self, width: int) -> Shares:
        """Every rank's spans of ``width`` key or value features."""
        return _spans([shard.kv or IDLE.kv for shard in self.shards], width // self.kv)

    def fused_shares(self, width: int) -> Shares:
        """Every rank's spans of [Q | K | V]."""
        dim = width // (self.query + 2 * self.kv)
        query, kv = self.query * dim, self.kv * dim
        return concatenated([(self.query_shares(query), query), *[(self.kv_shares(kv), kv)] * 2])

    def group_shares(self, width: int) -> Shares:
        """Every rank's spans of a projection that has, for every key/value head, [its query heads, K, V]."""
        group = self.query // self.kv
        dim = width // (self.query + 2 * self.kv)
        shares = []
        for shard in self.shards:
            query, kv = (shard.query, shard.kv) if shard.query else (IDLE.query, IDLE.kv)
            spans = []
            for head in kv:
                base = head * (group + 2) * dim
                first, last = max(query.start - head * group, 0), min(query.stop - head * group, group)
                spans.append(range(base + first * dim, base + last * dim))
                spans.append(range(base + group * dim, base + (group + 2) * dim))
            shares.append(partition.merge_spans(spans))
        return tuple(shares)

    def shares(self, style: str, width: int, path: str) -> Shares:
        """Every rank's output features of the projection at ``path``, by the plan's style for it.

        Raises:
            UnsupportedError: its width isn't a multiple of the number of heads.
        """
        count = {"query": self.query, "key_value": self.kv}.get(style, self.query + 2 * self.kv)
        if width % count:
            raise UnsupportedError(
                f"{path} has {width} features, not a multiple of {self.query} heads over {self.kv} key/value heads: "
                "multicard doesn't know this layout; pass plan= without it"
            )
        by_style = {
            "query": self.query_shares,
            "key_value": self.kv_shares,
            "qkv": self.fused_shares,
            "qkv_groups": self.group_shares,
        }
        return by_style[style](width)


def _spans(heads: list[range], dim: int) -> Shares:
    return tuple((range(h.start * dim, h.stop * dim),) if h else () for h in heads)


def _whole_groups(query: int, kv: int, parts: int) -> tuple[HeadShard, ...]:
    group = query // kv
    return tuple(
        HeadShard(
            range(share.start * group, share.stop * group), share, ((range(len(share) * group), range(len(share))),)
        )
        if share
        else HeadShard(range(0), range(0), ())
        for share in partition.split(kv, parts)
    )
