"""Parallel convolutions against torch's own in float64, on 2, 3 and 4 ranks, whatever divides."""

import pytest
import torch
from torch import nn

from multicard.errors import ConfigError
from multicard.layers.conv import ColumnParallelConv2d, ColumnParallelConv3d, RowParallelConv2d, RowParallelConv3d
from multicard.mesh import single

CASES = [
    {"in_channels": 5, "out_channels": 7, "kernel_size": 3, "padding": 1},
    {"in_channels": 4, "out_channels": 2, "kernel_size": (3, 2), "stride": 2, "padding": (0, 1), "bias": False},
    {"in_channels": 1, "out_channels": 1, "kernel_size": 1},
    {"in_channels": 6, "out_channels": 9, "kernel_size": 3, "groups": 3, "dilation": 2, "padding": 2},
    {"in_channels": 8, "out_channels": 8, "kernel_size": 3, "groups": 8, "padding": "same"},
    {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "groups": 2, "stride": (1, 2)},
    {"in_channels": 3, "out_channels": 5, "kernel_size": (3, 2), "padding": (2, 1), "padding_mode": "reflect"},
    {"in_channels": 5, "out_channels": 3, "kernel_size": 4, "padding": "same", "padding_mode": "replicate"},
    {"in_channels": 2, "out_channels": 4, "kernel_size": 3, "padding": 1, "groups": 2, "padding_mode": "circular"},
]


def convolutions(mesh):
    torch.manual_seed(0)
    errors = {}
    for i, case in enumerate(CASES):
        whole = nn.Conv2d(**case, dtype=torch.float64).requires_grad_(False)
        after = nn.Conv2d(whole.out_channels, 3, 3, padding=1, dtype=torch.float64).requires_grad_(False)
        x = torch.randn(2, whole.in_channels, 9, 8, dtype=torch.float64)
        expected = whole(x)
        column = ColumnParallelConv2d.from_conv(whole, mesh.tp)
        outputs = {
            "column": (ColumnParallelConv2d.from_conv(whole, mesh.tp, gather_output=True)(x), expected),
            "row": (RowParallelConv2d.from_conv(whole, mesh.tp, input_is_parallel=False)(x), expected),
            "column, no batch": (ColumnParallelConv2d.from_conv(whole, mesh.tp, gather_output=True)(x[0]), expected[0]),
            "row, no batch": (
                RowParallelConv2d.from_conv(whole, mesh.tp, input_is_parallel=False)(x[0]),
                expected[0],
            ),
        }
        row = RowParallelConv2d.from_conv(after, mesh.tp)
        if all(column.share(rank) == row.share(rank) for rank in range(mesh.tp.size)):  # with groups they may not
            outputs["both"] = (row(column(x).relu()), after(expected.relu()))
        for name, (got, wanted) in outputs.items():
            errors[i, name] = float((got - wanted).abs().max()) if got.shape == wanted.shape else got.shape
    return errors


VIDEO_CASES = [
    {"in_channels": 5, "out_channels": 7, "kernel_size": 3, "padding": 1},
    {"in_channels": 4, "out_channels": 6, "kernel_size": (2, 3, 1), "groups": 2, "stride": (1, 2, 1), "bias": False},
    {"in_channels": 1, "out_channels": 2, "kernel_size": 3, "padding": (1, 1, 2), "padding_mode": "replicate"},
]


def video_convolutions(mesh):
    torch.manual_seed(0)
    errors = {}
    for i, case in enumerate(VIDEO_CASES):
        whole = nn.Conv3d(**case, dtype=torch.float64).requires_grad_(False)
        x = torch.randn(2, whole.in_channels, 4, 7, 6, dtype=torch.float64)
        column = ColumnParallelConv3d.from_conv(whole, mesh.tp, gather_output=True)
        row = RowParallelConv3d.from_conv(whole, mesh.tp, input_is_parallel=False)
        for name, layer in (("column", column), ("row", row)):
            errors[i, name] = float((layer(x) - whole(x)).abs().max())
            errors[i, name, "no batch"] = float((layer(x[0]) - whole(x[0])).abs().max())
    return errors


@pytest.mark.parametrize("tp", [2, 3])
def test_videos(run_on, tp):
    for errors in run_on(video_convolutions, tp=tp):
        assert {case: error for case, error in errors.items() if not error < 1e-12} == {}


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_exact_at_any_degree(run_on, tp):
    for errors in run_on(convolutions, tp=tp):
        assert {case: error for case, error in errors.items() if not error < 1e-12} == {}


@pytest.mark.parametrize("cls", [ColumnParallelConv2d, RowParallelConv2d])
def test_one_rank_is_the_plain_layer(cls):
    layer = cls(3, 4, 3, padding=1, axis=single().tp, dtype=torch.float64)
    plain = nn.Conv2d(3, 4, 3, padding=1, dtype=torch.float64)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    assert torch.equal(layer(x), plain(x))


def test_parameters_keep_their_shard_rule():
    for cls in (ColumnParallelConv2d, RowParallelConv2d):
        built, copied = cls(4, 6, 3, axis=single().tp), cls.from_conv(nn.Conv2d(4, 6, 3), single().tp)
        for name, parameter in copied.named_parameters():
            assert getattr(built, name).shard == parameter.shard
            assert not getattr(built, name).requires_grad


def test_other_convolutions_are_refused():
    with pytest.raises(ConfigError, match="ConvTranspose2d"):
        RowParallelConv2d.from_conv(nn.ConvTranspose2d(1, 1, 3), single().tp)
    with pytest.raises(ConfigError, match=r"Conv2d isn't torch.nn.Conv3d"):
        ColumnParallelConv3d.from_conv(nn.Conv2d(1, 1, 3), single().tp)
