"""Operations on a tensor whose rows are split, against torch's own on the whole, in float64."""

import random

import pytest
import torch
import torch.nn.functional as F

from multicard.spatial import Rows, Split
from multicard.spatial.exchange import take
from multicard.spatial.layout import Layout


def picture(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def weight(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def written(x):
    y = x.clone()
    y[:, 1:] *= 2
    y += 1
    y[:, :1, 3:7] = 5
    return y


def into_a_whole(x):
    y = torch.zeros(x.shape, dtype=x.dtype)
    y[:, 1:] = x[:, 1:]
    return y


def with_skip(x):
    down = F.conv2d(x, weight(6, 4, 3, 3), stride=2, padding=1)
    up = F.interpolate(down, size=x.shape[2:])
    return torch.cat([up, x], 1)


def windows(x):
    b, c, h, w = x.shape
    y = x.view(b, c, h // 2, 2, w // 3, 3).permute(0, 2, 4, 3, 5, 1).reshape(-1, 6, c)
    return y.softmax(-1).reshape(b, h // 2, w // 3, 2, 3, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)


def tokens(x):
    return x.flatten(2).transpose(1, 2)


def attended(x):
    y = tokens(x).unflatten(-1, (2, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(y, y * 2, y + 1)


def masked(x):
    y = tokens(x).unflatten(-1, (2, -1)).transpose(1, 2)
    keep = weight(1, 1, y.shape[2], y.shape[2]) > 0
    return F.scaled_dot_product_attention(y, y * 2, y + 1, keep)


def to_text(x):
    y = tokens(x).unflatten(-1, (2, -1)).transpose(1, 2)
    text = weight(x.shape[0], 2, 5, y.shape[3])
    return F.scaled_dot_product_attention(y, text, text + 1)


def from_text(x):
    y = tokens(x).unflatten(-1, (2, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(weight(x.shape[0], 2, 5, y.shape[3]), y, y + 1)


def by_products(x):
    y = tokens(x)
    return (y @ (y * 2).transpose(1, 2)).softmax(-1) @ (y + 1)


def linear_attention(x):
    y = tokens(x).relu()
    return y @ (y.transpose(1, 2) @ (y + 1))


def over_time(x):
    b, t, c, h, w = x.shape
    y = x.permute(0, 3, 4, 1, 2).reshape(b * h * w, t, c)
    y = y + F.scaled_dot_product_attention(y[:, None], y[:, None] * 2, y[:, None])[:, 0]
    y = y + F.conv1d(y.transpose(1, 2), weight(c, c, 3), padding=1).transpose(1, 2)
    return F.group_norm(y.transpose(1, 2), 1).view(b, h, w, c, t).permute(0, 4, 3, 1, 2)


def with_text(x):
    y = torch.cat([weight(x.shape[0], 3, x.shape[1]), tokens(x)], 1)
    return F.linear(y, weight(7, x.shape[1]), weight(7))[:, 3:]


IMAGE, VIDEO = (2, 4, 12, 6), (2, 4, 3, 12, 6)
PADDED = ("reflect", "replicate", "circular", "constant")
CASES = {
    **{
        f"conv {k} {s} {p} {d}": (
            IMAGE,
            lambda x, k=k, s=s, p=p, d=d: F.conv2d(x, weight(5, 4, *k), weight(5), s, p, d),
        )
        for k, s, p, d in [
            ((3, 3), 1, 1, 1),
            ((1, 1), 1, 0, 1),
            ((5, 3), 1, (2, 1), 1),
            ((3, 3), 2, 1, 1),
            ((3, 3), 1, 2, 2),
            ((4, 4), 2, 1, 1),
            ((2, 2), 2, 0, 1),
            ((3, 3), 1, 0, 1),
            ((7, 1), 3, (3, 0), 1),
            ((3, 3), 3, 4, 1),
            ((1, 3), 2, (0, 1), 1),
        ]
    },
    "conv in groups": (IMAGE, lambda x: F.conv2d(x, weight(4, 1, 3, 3), None, 1, 1, 1, 4)),
    "conv, padded beforehand": (IMAGE, lambda x: F.conv2d(F.pad(x, (0, 1, 0, 1)), weight(4, 4, 3, 3), stride=2)),
    "conv same": (IMAGE, lambda x: F.conv2d(x, weight(4, 4, 4, 3), padding="same")),
    "conv transposed": (IMAGE, lambda x: F.conv_transpose2d(x, weight(4, 5, 4, 4), weight(5), 2, 1)),
    "conv transposed 2": (IMAGE, lambda x: F.conv_transpose2d(x, weight(4, 5, 2, 2), None, 2)),
    "conv transposed 3": (IMAGE, lambda x: F.conv_transpose2d(x, weight(4, 5, 3, 3), None, 1, 1)),
    "conv 3d": (VIDEO, lambda x: F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), weight(5, 4, 3, 3, 3), weight(5))),
    "conv over time": (VIDEO, lambda x: F.conv3d(x, weight(5, 4, 3, 1, 1), padding=(1, 0, 0))),
    **{f"pad {mode}": (IMAGE, lambda x, mode=mode: F.pad(x, (1, 2, 3, 2), mode=mode)) for mode in PADDED},
    "pad 3d": (VIDEO, lambda x: F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate")),
    "crop": (IMAGE, lambda x: F.pad(x, (0, 0, -1, -2))),
    **{
        f"padded conv {mode}": (
            IMAGE,
            lambda x, mode=mode: F.conv2d(F.pad(x, (1, 1, 1, 1), mode=mode), weight(4, 4, 3, 3)),
        )
        for mode in PADDED
    },
    **{f"pool {k} {s}": (IMAGE, lambda x, k=k, s=s: F.avg_pool2d(x, k, s)) for k, s in [(2, 2), (3, 1), (3, 2)]},
    "nearest": (IMAGE, lambda x: F.interpolate(x, scale_factor=2.0)),
    "nearest to size": (IMAGE, lambda x: F.interpolate(x, size=(17, 5))),
    "nearest 3d": (VIDEO, lambda x: F.interpolate(x, scale_factor=(1, 2, 2))),
    "nearest exact": (IMAGE, lambda x: F.interpolate(x, size=(7, 8), mode="nearest-exact")),
    **{
        f"{mode} {corners} {size}": (
            IMAGE,
            lambda x, mode=mode, corners=corners, size=size: F.interpolate(x, size, mode=mode, align_corners=corners),
        )
        for mode in ("bilinear", "bicubic")
        for corners in (False, True)
        for size in ((24, 12), (7, 9))
    },
    "bilinear by scale": (IMAGE, lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear")),
    "antialias": (IMAGE, lambda x: F.interpolate(x, (5, 6), mode="bicubic", antialias=True)),
    "trilinear": (VIDEO, lambda x: F.interpolate(x, (5, 24, 12), mode="trilinear")),
    "pixel shuffle": (IMAGE, lambda x: F.pixel_shuffle(x, 2)),
    "pixel unshuffle": (IMAGE, lambda x: F.pixel_unshuffle(x, 2)),
    "group norm": (IMAGE, lambda x: F.group_norm(x + 100, 2, weight(4), weight(4))),
    "group norm of tokens": (IMAGE, lambda x: F.group_norm(x.flatten(2), 2, weight(4), weight(4))),
    "instance norm": (IMAGE, lambda x: F.instance_norm(x, None, None, weight(4), weight(4))),
    "batch norm": (IMAGE, lambda x: F.batch_norm(x, weight(4), weight(4).abs(), weight(4), weight(4))),
    "layer norm": (IMAGE, lambda x: F.layer_norm(tokens(x), (4,), weight(4), weight(4))),
    "rms norm": (IMAGE, lambda x: F.rms_norm(tokens(x), (4,), weight(4))),
    "normalized": (IMAGE, lambda x: F.normalize(x, dim=1)),
    "mean": (IMAGE, lambda x: x * x.mean((2, 3), keepdim=True)),
    "sum and amax": (IMAGE, lambda x: x.sum(2) + x.amax((1, 2))[:, None] - x.sum(1).amin(1)[:, None]),
    "norm": (IMAGE, lambda x: x / torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)),
    "any": (IMAGE, lambda x: x * (x > 2).any() + x * (x > -99).all()),
    "adaptive pool": (IMAGE, lambda x: F.adaptive_avg_pool2d(x, 1)),
    "arithmetic": (IMAGE, lambda x: torch.where(x > 0, x.exp() * 2 - x, x.clamp(-1, 1) / 3) + weight(4, 1, 1)),
    "whole operand": (IMAGE, lambda x: x * weight(12, 6) + weight(2, 4, 12, 1) - weight(12, 1)),
    "written": (IMAGE, written),
    "into a whole": (IMAGE, into_a_whole),
    "with skip": (IMAGE, with_skip),
    "slices": (IMAGE, lambda x: x[:, 1:3, 2:-1] + x[:, :2, 1:-2]),
    "new": (IMAGE, lambda x: x.new_ones(x.shape) + x.new_zeros(1, 1, 12, 6) + x),
    "every third": (IMAGE, lambda x: x[:, :, 1:-1:3] + x[:, :, ::3]),
    "chunks": (IMAGE, lambda x: torch.cat([a * i for i, a in enumerate(x.chunk(3, 1))] + [x.unbind(1)[0][:, None]], 1)),
    "cat along rows": (IMAGE, lambda x: torch.cat([x[:, :, 3:], weight(2, 4, 2, 6), x * 2], 2)),
    "stacked": (IMAGE, lambda x: torch.stack([x, x * 2], 1).sum(1)),
    "repeated": (IMAGE, lambda x: x.repeat(1, 2, 1, 2).repeat_interleave(2, dim=1)[:, None].expand(-1, 3, -1, -1, -1)),
    "windows": (IMAGE, windows),
    "attended": (IMAGE, attended),
    "masked": (IMAGE, masked),
    "to text": (IMAGE, to_text),
    "from text": (IMAGE, from_text),
    "by products": (IMAGE, by_products),
    "linear attention": (IMAGE, linear_attention),
    "with text": (IMAGE, with_text),
    "over time": (VIDEO, over_time),
    "channels last": (
        IMAGE,
        lambda x: F.group_norm(F.conv2d(x.to(memory_format=torch.channels_last), weight(4, 4, 3, 3)), 2),
    ),
}
TOLERANCE = {"attended": 1e-6, "masked": 1e-6}  # ranks' parts are merged in float32
WHOLE = {  # the operations without a rule, which gather
    "from text": {"scaled_dot_product_attention"},
    "into a whole": {"copy_"},
}


def layouts(rows, ranks, dim):
    """An even split, one with empty parts, and one at random."""
    dice = random.Random(ranks)
    yield Layout(dim, tuple(rows * i // ranks for i in range(ranks + 1)))
    yield Layout(dim, (0, *[rows] * ranks))
    yield Layout(dim, (*[0] * ranks, rows))
    yield Layout(dim, (0, *sorted(dice.randrange(rows + 1) for _ in range(ranks - 1)), rows))


def compare(mesh):
    found = {}
    for name, (shape, function) in CASES.items():
        x = picture(*shape)
        expected = function(x)
        for layout in layouts(shape[-2], mesh.sequence.size, x.dim() - 2):
            split = Split(mesh)
            got = function(Rows(take(x, layout, mesh.sequence.rank).clone(), layout, split))
            got = got.gathered() if isinstance(got, Rows) else got
            error = float((got - expected).abs().max()) if got.shape == expected.shape else got.shape
            found[name, layout.cuts] = error, {*split.whole}
    return found


@pytest.mark.parametrize(
    ("backend", "ring", "ulysses"),
    [("auto", 2, 1), pytest.param("auto", 3, 1, marks=pytest.mark.seam), ("auto", 2, 2), ("gloo", 2, 1)],
)
def test_an_operation_gives_what_it_gives_on_the_whole(run_on, backend, ring, ulysses):
    for found in run_on(compare, backend=backend, ring=ring, ulysses=ulysses):
        errors = {case: error for case, (error, _) in found.items()}
        assert {case: e for case, e in errors.items() if not e < TOLERANCE.get(case[0], 1e-11)} == {}
        assert {case: whole for case, (_, whole) in found.items() if whole != WHOLE.get(case[0], set())} == {}
