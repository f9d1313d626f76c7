"""Diffusion transformers on two ranks of one thread: guidance branches, Ulysses, ring and tensor parallel.

    python benchmarks/cfg.py --rounds 5

Two denoisers, each called on both branches of one guided step: the digits model of examples/digits, and one double and
one single block of Flux at a width that a CPU bears. Beside them one process of one thread and of two, and what
diffusers' own context parallel says here. "bound" is the same ranks doing the same local work at the same time with
every exchange taken out. Every round runs every contestant; figures are medians.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import diffusers
import torch

import multicard as mc
from common import alternate, report, without_exchanges
from multicard import collectives

DIGITS = pathlib.Path(__file__).parents[1] / "examples" / "digits" / "pipeline"
DEGREES: dict[str, dict[str, int]] = {f"{axis}=2": {axis: 2} for axis in ("cfg", "ulysses", "ring", "tp")}
CALLS = {"digits": 10, "flux": 1}

Call = Callable[[], object]


def digits(images: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The digits model and both branches of ``images`` pictures."""
    model = diffusers.DiTTransformer2DModel.from_pretrained(DIGITS, subfolder="transformer", use_safetensors=True)
    labels = torch.arange(images) % 10
    return model, {
        "hidden_states": torch.randn(2 * images, 1, 8, 8),
        "timestep": torch.full((2 * images,), 500),
        "class_labels": torch.cat([labels, torch.full_like(labels, 1000)]),
    }


def flux(tokens: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Two Flux blocks of width 768, and both branches of a picture of ``tokens`` tokens with 128 of text."""
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=64,
        num_attention_heads=12,
        joint_attention_dim=768,
        pooled_projection_dim=768,
        axes_dims_rope=(8, 28, 28),
    )
    return model, {
        "hidden_states": torch.randn(2, tokens, 64),
        "encoder_hidden_states": torch.randn(2, 128, 768),
        "pooled_projections": torch.randn(2, 768),
        "timestep": torch.full((2,), 0.5),
        "img_ids": torch.stack([torch.zeros(tokens), torch.arange(tokens) // 32, torch.arange(tokens) % 32], 1),
        "txt_ids": torch.zeros(128, 3),
    }


# --- on a rank --------------------------------------------------------------------------------------------------------


def make(mesh: mc.ParallelMesh, name: str, size: int, degrees: dict[str, int], compiled: bool = False) -> Call:
    """A denoiser split over the mesh of ``degrees``, and its arguments."""
    torch.manual_seed(0)
    model, arguments = {"digits": digits, "flux": flux}[name](size)
    model = model.eval().requires_grad_(False)
    if degrees:
        mc.parallelize(model, mc.init_mesh(mc.ParallelConfig(**degrees)))
    if compiled:
        model.compile()
    return functools.partial(model, **arguments)


def run(mesh: mc.ParallelMesh, call: Call, calls: int, exchanges: bool = True) -> None:
    with torch.no_grad(), contextlib.nullcontext() if exchanges else without_exchanges():
        for _ in range(calls):
            call()
    collectives.barrier(mesh.world)


def error(mesh: mc.ParallelMesh, call: Call, name: str, size: int) -> float:
    """The largest difference from the model on one rank, relative to the largest value."""
    with torch.no_grad():
        wanted = make(mc.single(), name, size, {})().sample
        return float((call().sample - wanted).abs().max() / wanted.abs().max())


def diffusers_own(mesh: mc.ParallelMesh) -> str:
    """What diffusers' own context parallel says to the Flux blocks on this device."""
    from diffusers import ContextParallelConfig

    try:
        flux(256)[0].enable_parallelism(config=ContextParallelConfig(ulysses_degree=mesh.world_size))
    except Exception as reason:  # whatever it raises is the answer
        return f"{type(reason).__name__}: {str(reason).splitlines()[0][:100]}"
    return "runs"


# --- the contest ------------------------------------------------------------------------------------------------------


def contest(name: str, size: int, rounds: int, backend: str, compiled: bool) -> list[dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        start = functools.partial(mc.Ranks, timeout=300.0)
        one = stack.enter_context(start(mc.ParallelConfig(), threads_per_rank=1))
        wide = stack.enter_context(start(mc.ParallelConfig(), threads_per_rank=2))
        two = stack.enter_context(start(mc.ParallelConfig(dp=2), threads_per_rank=1, backend=backend))
        calls, contestants, errors = CALLS[name], {}, {}
        for label, ranks in (("1 process of 1 thread", one), ("1 process of 2 threads", wide)):
            contestants[label] = functools.partial(ranks.run, run, ranks.keep(make, name, size, {}), calls)
        for label, degrees in DEGREES.items():
            kept = two.keep(make, name, size, degrees)
            errors[label] = max(two.run(error, kept, name, size))
            contestants[label] = functools.partial(two.run, run, kept, calls)
            contestants[f"{label} bound"] = functools.partial(two.run, run, kept, calls, False)
        if compiled:
            plans = [("1 process of 1 thread", one, {}), *((label, two, degrees) for label, degrees in DEGREES.items())]
            for label, ranks, degrees in plans:
                kept, label = ranks.keep(make, name, size, degrees, True), f"{label}, compiled"
                errors[label] = max(ranks.run(error, kept, name, size))
                contestants[label] = functools.partial(ranks.run, run, kept, calls)
        times = {label: seconds / calls for label, seconds in alternate(contestants, rounds).items()}
        own = two.run(diffusers_own)[0]
    rows = []
    for label in (label for label in times if not label.endswith("bound")):
        limit = times.get(f"{label} bound")
        rows.append(
            {
                "model": name,
                "contestant": label,
                "ms a step": times[label] * 1e3,
                "bound ms": limit * 1e3 if limit else "",
                "of bound": limit / times[label] if limit else "",
                "× 1 thread": times["1 process of 1 thread"] / times[label],
                "error": errors.get(label, ""),
            }
        )
    return [*rows, {**dict.fromkeys(rows[0], ""), "model": name, "contestant": f"diffusers' own: {own}"}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=40, help="digits in one batch")
    parser.add_argument("--tokens", type=int, default=1024, help="image tokens of the Flux blocks, a multiple of 32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=["digits", "flux"], choices=["digits", "flux"])
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--compiled", action="store_true", help="also under torch.compile")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    sizes = {"digits": args.images, "flux": args.tokens}
    rows = [row for name in args.models for row in contest(name, sizes[name], args.rounds, args.backend, args.compiled)]
    report(rows, args.json, diffusers=diffusers.__version__, rounds=args.rounds)


if __name__ == "__main__":
    main()
