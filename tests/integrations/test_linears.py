"""What counts as a linear layer: whatever multiplies in a way of its own is never split as a plain one."""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

import multicard as mc
import zoo
from multicard.axis import Axis
from multicard.errors import UnsupportedError
from multicard.integrations.linears import check_linear, column_parallel, row_parallel

FIRST = Axis("tp", 0, 1)


class Named(torch.nn.Linear):
    """A subclass that changes nothing."""


class Scaled(torch.nn.Linear):
    """A subclass that multiplies in a way of its own."""

    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize("make", [torch.nn.Linear, Named, lambda rows, columns: Conv1D(columns, rows)])
def test_linear_layers_of_every_kind(make):
    torch.manual_seed(0)
    linear, x = make(5, 7), torch.randn(3, 5)
    assert check_linear(linear, "here") == (5, 7)
    for split in (column_parallel(linear, FIRST, "here"), row_parallel(linear, FIRST, "here")):
        torch.testing.assert_close(split(x), linear(x))


@pytest.mark.parametrize("module", [Scaled(5, 7), torch.nn.Conv1d(5, 7, 1), torch.nn.Identity()], ids=str)
def test_anything_else_is_refused_by_name(module):
    with pytest.raises(UnsupportedError, match=rf"^here is a {type(module).__name__}, not a plain linear layer"):
        check_linear(module, "here")


def split(mesh, name, spoil):
    """The error relative to one process of a model that was changed before the split, or why it was refused."""
    models = zoo.build(name), zoo.build(name)
    for model in models:
        spoil(model)
    expected = zoo.forward(models[0], name)
    try:
        return zoo.relative_error(zoo.forward(mc.parallelize(models[1], mesh), name), expected)
    except UnsupportedError as error:
        return str(error)


def with_a_scaled_head(model):
    head = model.lm_head
    model.lm_head = Scaled(head.in_features, head.out_features, bias=False)
    model.lm_head.weight = head.weight


def with_a_scaled_projection(model):
    model.model.layers[1].mlp.down_proj.__class__ = Scaled


class L2Norm(torch.nn.Module):
    """Over all features that it is given, and without parameters."""

    def forward(self, x):
        return torch.nn.functional.normalize(x, dim=-1)


def with_a_norm_over_all_heads(model):
    for layer in model.model.layers:
        layer.self_attn.sub_norm = L2Norm()


def as_it_is(model):
    """BioGPT with a number of key/value heads in its config, which its attention doesn't read."""


def test_a_head_that_multiplies_in_its_own_way_stays_whole(run_on):
    assert max(run_on(split, "llama", with_a_scaled_head, tp=2)) < 1e-5


@pytest.mark.parametrize(
    ("name", "spoil", "why"),
    [
        ("llama", with_a_scaled_projection, r"down_proj is a Scaled, not a plain linear layer"),
        ("llama", with_a_norm_over_all_heads, r"its child 'sub_norm' \(L2Norm"),
        ("biogpt", as_it_is, r"9 query heads of \[8\] features and 3 key/value heads of \[24\]"),
    ],
    ids=["a projection", "a norm", "a number of heads"],
)
def test_what_would_be_wrong_is_refused(run_on, name, spoil, why):
    for said in run_on(split, name, spoil, tp=2):
        with pytest.raises(UnsupportedError, match=why):
            raise UnsupportedError(said)
