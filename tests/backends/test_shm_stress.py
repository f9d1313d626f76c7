"""Many random collectives in many groups, without a wrong bit: with more ranks than cores, too."""

import random

import pytest
import torch
import torch.distributed as dist

KINDS = ("all_reduce", "all_gather", "broadcast", "all_to_all", "ring", "reduce", "gather", "scatter",
         "reduce_scatter", "barrier")  # fmt: skip
SPAN = 1 << 20


def stress(mesh, count, seed):
    """The same random calls on every rank that is in the group."""
    rank, size = dist.get_rank(), dist.get_world_size()
    members = [[*range(size)], [0, size - 1], [*range(1, size)], [*range(size - 1)], [1, size - 1]]
    groups = [dist.new_group(ranks) for ranks in members]
    chance = random.Random(seed)
    pool = torch.randint(-1000, 1000, (2 * SPAN,), generator=torch.Generator().manual_seed(seed)).float()
    for number in range(count):
        which, kind = chance.randrange(len(groups)), chance.choice(KINDS)
        n = int(2 ** chance.uniform(0, chance.choice((8, 12, 14, 17, 20))))
        start, root = chance.randrange(SPAN - 100), chance.choice(members[which])
        if rank in members[which]:
            draw = Draw(pool, start, n, members[which], rank)
            assert draw.run(kind, groups[which], root), f"call {number}, {kind} of {n} elements on {members[which]}"
    for group in groups:
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)


class Draw:
    """One random call: what every rank brings, and whether this one got what it should."""

    def __init__(self, pool, start, n, ranks, rank):
        self.ranks, self.me = ranks, ranks.index(rank)
        self.all = [pool[start + 7 * i : start + 7 * i + n] for i in range(len(ranks))]
        self.mine = self.all[self.me].clone()

    def run(self, kind, group, root):
        return getattr(self, kind)(group, root)

    def total(self):
        return torch.stack(self.all).sum(0)  # integers: exact in any order

    def all_reduce(self, group, root):
        dist.all_reduce(self.mine, group=group)
        return torch.equal(self.mine, self.total())

    def reduce(self, group, root):
        dist.reduce(self.mine, root, group=group)
        return root != self.ranks[self.me] or torch.equal(self.mine, self.total())

    def reduce_scatter(self, group, root):
        sizes = [(len(self.mine) + i) // len(self.all) for i in range(len(self.all))]
        out = torch.empty(sizes[self.me])
        dist.reduce_scatter(out, list(self.mine.split(sizes)), group=group)
        return torch.equal(out, self.total().split(sizes)[self.me])

    def broadcast(self, group, root):
        dist.broadcast(self.mine, root, group=group)
        return torch.equal(self.mine, self.all[self.ranks.index(root)])

    def all_gather(self, group, root):
        outs = [torch.empty_like(x) for x in self.all]
        dist.all_gather(outs, self.mine, group=group)
        return all(map(torch.equal, outs, self.all))

    def gather(self, group, root):
        outs = [torch.empty_like(x) for x in self.all] if root == self.ranks[self.me] else None
        dist.gather(self.mine, outs, root, group=group)
        return outs is None or all(map(torch.equal, outs, self.all))

    def scatter(self, group, root):
        out = torch.empty_like(self.mine)
        dist.scatter(out, self.all if root == self.ranks[self.me] else None, root, group=group)
        return torch.equal(out, self.mine)

    def all_to_all(self, group, root):
        sizes = [(len(self.mine) + i) // len(self.all) for i in range(len(self.all))]
        own = sizes[self.me]
        out = torch.empty(own * len(self.all))
        dist.all_to_all_single(out, self.mine, [own] * len(self.all), sizes, group=group)
        return torch.equal(out, torch.cat([x.split(sizes)[self.me] for x in self.all]))

    def ring(self, group, root):
        size, out = len(self.ranks), torch.empty_like(self.mine)
        to, source = self.ranks[(self.me + 1) % size], self.ranks[self.me - 1]
        works = [dist.isend(self.mine, to, group), dist.irecv(out, source, group)]
        if len(out) % 2:
            dist.barrier(group)  # another wait moves them along as well
        for work in works:
            work.wait()
        return torch.equal(out, self.all[self.me - 1])

    def barrier(self, group, root):
        dist.barrier(group)
        return True


def test_two_thousand_random_collectives(run_on):
    run_on(stress, 2000, 1, dp=4)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(10))
def test_a_hundred_thousand_random_collectives(run_on, seed):
    run_on(stress, 10_000, seed, dp=4)
