import itertools

import pytest
import torch

import multicard as mc
from multicard import collectives
from multicard.errors import ConfigError


def test_single_needs_no_process_group():
    mesh = mc.single()
    assert mesh.world_size == 1
    assert mesh.device_mesh is None
    assert mesh.tp == mc.Axis("tp", rank=0, size=1)
    x = torch.arange(3.0)
    for same in (collectives.all_reduce(x, mesh.tp), collectives.all_gather(x, mesh.cfg)):
        assert same is x


def test_outside_any_job_only_one_rank_is_possible():
    assert mc.init_mesh(mc.ParallelConfig()).world_size == 1
    with pytest.raises(ConfigError, match=r"init_mesh\(tp=2\) outside any job: start 2 ranks with"):
        mc.init_mesh(mc.ParallelConfig(tp=2))


def test_a_device_that_is_not_here_is_refused():
    with pytest.raises(ConfigError, match="device='abacus'"):
        mc.init_mesh(mc.ParallelConfig(), device="abacus")


def test_an_axis_knows_its_size():
    with pytest.raises(ConfigError, match="rank 2 of axis 'tp' is outside its 2"):
        mc.Axis("tp", rank=2, size=2)


DEGREES = [
    {"tp": 3},
    {"dp": 2, "tp": 2},
    {"cfg": 2, "ring": 2},
    {"ring": 2, "ulysses": 2},
    {"ulysses": 2, "tp": 2},
]


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_axes_hold_the_ranks_that_differ_on_them_alone(run_on, degrees):
    def members(mesh):
        """Global ranks on each axis, told by the ranks themselves."""
        me = torch.tensor([float(mesh.rank)])
        axes = (mesh.dp, mesh.cfg, mesh.ring, mesh.ulysses, mesh.tp, mesh.sequence, mesh.replica, mesh.world)
        told = {a.name: (a.rank, [int(r) for r in collectives.all_gather(me.clone(), a)]) for a in axes}
        return mesh.rank, told, mc.init_mesh(mesh.config) is mesh

    config = mc.ParallelConfig(**degrees)
    places = [config.coordinates(rank) for rank in range(config.world_size)]
    values = run_on(members, **degrees)
    for rank, (told_rank, told, same) in enumerate(values):
        assert told_rank == rank
        assert same, "asking again must give the same mesh"
        for name in config.degrees:
            beside = [
                r
                for r in range(config.world_size)
                if all(places[r][other] == places[rank][other] for other in config.degrees if other != name)
            ]
            assert told[name] == (places[rank][name], beside)
        ring, ulysses = places[rank]["ring"], places[rank]["ulysses"]
        assert told["sequence"][0] == ring * config.ulysses + ulysses
        replica = [r for r in range(config.world_size) if places[r]["dp"] == places[rank]["dp"]]
        assert told["replica"] == (replica.index(rank), replica)
        assert told["world"] == (rank, list(range(config.world_size)))


def test_slices_of_the_sequence_axis_are_in_rank_order(run_on):
    def gathered(mesh):
        return collectives.all_gather(torch.tensor([[mesh.ring.rank, mesh.ulysses.rank]]), mesh.sequence).tolist()

    expected = [list(pair) for pair in itertools.product(range(2), range(2))]
    assert run_on(gathered, ring=2, ulysses=2) == [expected] * 4


def test_a_mesh_of_another_size_than_the_job_is_refused_on_every_rank(run_on):
    def other_mesh(mesh):
        with pytest.raises(ConfigError, match="needs 3 ranks and this job has 2"):
            mc.init_mesh(mc.ParallelConfig(tp=3))
        return "refused"

    assert run_on(other_mesh, tp=2) == ["refused"] * 2
