import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import multicard as mc
from multicard.config import AXES
from multicard.errors import ConfigError

degrees = st.fixed_dictionaries({}, optional={name: st.integers(1, 4) for name in AXES})


def test_world_size_is_the_product():
    assert mc.ParallelConfig(dp=2, cfg=2, ring=3, ulysses=1, tp=2).world_size == 24
    assert mc.ParallelConfig().world_size == 1


def test_tp_is_innermost_and_dp_outermost():
    config = mc.ParallelConfig(dp=2, cfg=2, ring=2, ulysses=2, tp=2)
    assert config.coordinates(1) == {"dp": 0, "cfg": 0, "ring": 0, "ulysses": 0, "tp": 1}
    assert config.coordinates(16) == {"dp": 1, "cfg": 0, "ring": 0, "ulysses": 0, "tp": 0}


@given(degrees)
def test_coordinates_follow_the_published_formula(degrees):
    config = mc.ParallelConfig(**degrees)
    places = [config.coordinates(rank) for rank in range(config.world_size)]
    assert places == [dict(zip(AXES, p, strict=True)) for p in itertools.product(*map(range, config.degrees.values()))]
    for rank, at in enumerate(places):
        outer = (at["dp"] * config.cfg + at["cfg"]) * config.ring + at["ring"]
        assert rank == (outer * config.ulysses + at["ulysses"]) * config.tp + at["tp"]


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        mc.ParallelConfig().tp = 2


@pytest.mark.parametrize("degree", [0, -1, 1.0, "2", True, None])
def test_degrees_are_positive_integers(degree):
    with pytest.raises(ConfigError, match="tp="):
        mc.ParallelConfig(tp=degree)


def test_an_unknown_axis_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown mesh axis 'ulises'.*did you mean 'ulysses'"):
        mc.ParallelConfig(ulises=2)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_mesh_is_refused(rank):
    with pytest.raises(ConfigError, match="outside this mesh of 2"):
        mc.ParallelConfig(tp=2).coordinates(rank)
