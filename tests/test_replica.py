"""Ranks of one replica compare what they were given: any difference is an error on every rank, and nothing else is."""

import dataclasses
import enum

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import multicard as mc
from multicard.digest import describe, hash_tensor
from multicard.errors import MismatchError
from multicard.replica import Replica


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Setting:
    scale: float


def base():
    """One of each kind of input."""
    from PIL import Image

    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2, 3, 5, generator=generator)
    return {
        "text": "a cat",
        "number": 7,
        "scale": 5.0,
        "flag": True,
        "latents": noise,
        "half": noise.bfloat16(),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "transposed": noise.transpose(0, 2),
        "scalar": torch.tensor(3),
        "array": np.arange(6.0).reshape(2, 3),
        "picture": Image.new("RGB", (3, 2), (1, 2, 3)),
        "generator": generator,
        "nested": {"b": [1, (2, None)], "a": {"x": noise[:1]}},
        "names": {"red", "blue"},
        "colour": Colour.RED,
        "setting": Setting(0.5),
        "dtype": torch.float32,
    }


def last_number(x):
    """The least change: one bit of the last number."""
    x = x.clone().contiguous()
    x.view(torch.uint8).view(-1)[-1 if x.dtype.itemsize == 1 else -x.dtype.itemsize] ^= 1
    return x


CHANGES = {
    "another text": ("text", lambda x: "a cow"),
    "a surrogate": ("text", lambda x: "a cat\ud800"),
    "a text for a number": ("number", str),
    "another number": ("number", lambda x: x + 1),
    "another scale, by the least": ("scale", lambda x: float(np.nextafter(x, 6))),
    "an int for a float": ("scale", int),
    "an int for a bool": ("flag", int),
    "a bit of the last number": ("latents", last_number),
    "a bit of the last half": ("half", last_number),
    "a byte": ("bytes", last_number),
    "the sign": ("latents", torch.neg),
    "rows exchanged": ("latents", lambda x: x.flip(0)),
    "another shape": ("latents", lambda x: x.reshape(3, 2, 5)),
    "another dtype": ("latents", torch.Tensor.double),
    "a transposed tensor's numbers": ("transposed", lambda x: last_number(x)),
    "a number in a tensor": ("scalar", lambda x: x + 1),
    "a number for a tensor": ("scalar", int),
    "an array's number": ("array", lambda x: x + (x == 5) * 1e-9),
    "a picture's size": ("picture", lambda x: x.resize((2, 3))),
    "a picture's colour": ("picture", lambda x: x.point(lambda v: v + (v == 3))),
    "another seed": ("generator", lambda x: torch.Generator().manual_seed(4)),
    "a generator that has drawn": ("generator", lambda x: [torch.randn(1, generator=x), x][1]),
    "no generator": ("generator", lambda x: None),
    "deep in a list": ("nested", lambda x: {**x, "b": [1, (2, 3)]}),
    "deep in a tensor": ("nested", lambda x: {**x, "a": {"x": last_number(x["a"]["x"])}}),
    "another key": ("nested", lambda x: {"c": x["b"], "a": x["a"]}),
    "a tuple for a list": ("nested", lambda x: {**x, "b": tuple(x["b"])}),
    "another name": ("names", lambda x: {"red", "green"}),
    "another member": ("colour", lambda x: Colour.BLUE),
    "another field": ("setting", lambda x: Setting(0.25)),
    "another type": ("dtype", lambda x: torch.bfloat16),
}
SAME = {
    "keys in another order": ("nested", lambda x: dict(reversed(list(x.items())))),
    "other strides": ("transposed", torch.Tensor.contiguous),
    "an expanded tensor": ("scalar", lambda x: x.expand(())),
    "nothing": ("text", lambda x: x),
}


def outcomes(mesh, changes):
    """What each change on the last rank leads to: an error's text, or None."""
    replica, found = Replica(mesh), {}
    for case, (name, change) in changes.items():
        inputs = base()
        if mesh.rank == mesh.world.size - 1:
            inputs[name] = change(inputs[name])
        try:
            replica.compare("the test", inputs)
            found[case] = None
        except MismatchError as error:
            found[case] = str(error)
    return found


MESHES = [{"tp": 2}, {"ulysses": 3}, {"cfg": 2, "tp": 2}, {"ring": 2, "ulysses": 2}]


@pytest.fixture(scope="module")
def told(run_on):
    return {str(degrees): run_on(outcomes, CHANGES | SAME, **degrees) for degrees in MESHES}


@pytest.mark.parametrize("degrees", MESHES, ids=str)
@pytest.mark.parametrize("case", CHANGES)
def test_a_difference_is_told_on_every_rank(told, degrees, case):
    name, _ = CHANGES[case]
    for rank in told[str(degrees)]:
        assert rank[case] is not None
        assert f"the test: ranks were given different inputs: {name} is" in rank[case]


@pytest.mark.parametrize("degrees", MESHES, ids=str)
@pytest.mark.parametrize("case", SAME)
def test_what_is_equal_passes(told, degrees, case):
    assert [rank[case] for rank in told[str(degrees)]] == [None] * len(told[str(degrees)])


def test_other_points_are_told(run_on):
    def at_points(mesh):
        with pytest.raises(MismatchError) as caught:
            Replica(mesh).compare("a forward" if mesh.rank == 0 else "a step", {})
        return str(caught.value)

    for message in run_on(at_points, ulysses=3, tp=1):
        assert "ranks 0 and 1 are at different points: a forward and a step" in message


def test_replicas_may_differ(run_on):
    def by_replica(mesh):
        Replica(mesh).compare("the test", {"prompt": mesh.dp.rank})
        with pytest.raises(MismatchError):
            Replica(mesh, whole_mesh=True).compare("the test", {"prompt": mesh.dp.rank})
        return True

    assert all(run_on(by_replica, dp=2, tp=2))


def test_it_can_be_left_out(run_on):
    def compare(mesh):
        Replica(dataclasses.replace(mesh, compares_inputs=False)).compare("the test", {"rank": mesh.rank})
        return True

    assert all(run_on(compare, tp=2))
    with mc.Ranks(mc.ParallelConfig(tp=2), compare_inputs=False) as ranks:
        assert ranks.run(lambda mesh: mesh.compares_inputs) == [False, False]


def test_the_first_ranks_noise_is_everybodys(run_on):
    def draws(mesh):
        torch.manual_seed(mesh.rank)
        first = torch.randn(5, generator=torch.Generator().manual_seed(0))
        Replica(mesh).same_noise()
        return torch.randn(5), first

    for noise, _ in run_on(draws, cfg=2, tp=2):
        assert torch.equal(noise, torch.randn(5, generator=torch.Generator().manual_seed(0)))


@settings(deadline=None, max_examples=100)
@given(size=st.integers(1, 200_000), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_cards_hash_sees_every_bit(size, place, bit):
    """The hash that runs on a card, here on the CPU."""
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    other = data.clone()
    other[int(place * size)] ^= 1 << bit
    assert hash_tensor(data) == hash_tensor(data.clone())
    assert hash_tensor(data) != hash_tensor(other)
    assert hash_tensor(data) != hash_tensor(data.flip(0)) or torch.equal(data, data.flip(0))


def test_a_meta_tensor_counts_by_its_shape():
    assert describe(torch.empty(2, device="meta")).hash_here() == describe(torch.ones(2, device="meta")).hash_here()
    assert describe(torch.empty(2, device="meta")).hash_here() != describe(torch.empty(3, device="meta")).hash_here()
