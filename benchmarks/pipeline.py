"""Decoders and U-Nets by rows of pictures on two ranks of one thread, and where the time of a pipeline goes.

    python benchmarks/pipeline.py --rounds 5

A decoder as large as Stable Diffusion's (random weights) and one step of a small U-Net that is shaped as SDXL's; beside
them one process of one thread and of two. "bound" is the same ranks doing the same local work at the same time with
every exchange taken out. Every round runs every contestant; figures are medians. The second table has the seconds of
each component in one run of a pipeline of SDXL's shape, and the megabytes that a rank holds of it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import torch

import multicard as mc
from common import alternate, print_table, report, without_exchanges
from multicard import collectives
from multicard.integrations.diffusers.reports import held

Call = Callable[[], object]
MESHES: dict[str, list[dict[str, int]]] = {"decoder": [{"ulysses": 2}], "unet": [{"ulysses": 2}, {"cfg": 2}]}

COMPONENTS: list[dict[str, int]] = [{}, {"cfg": 2}, {"ulysses": 2}, {"tp": 2}]


def decoder() -> diffusers.AutoencoderKL:
    """Of Stable Diffusion's size."""
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )


def unet() -> diffusers.UNet2DConditionModel:
    """Of SDXL's shape, a fifth as wide and with fewer layers."""
    return diffusers.UNet2DConditionModel(
        block_out_channels=(64, 128, 256),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 4),
        attention_head_dim=(2, 4, 8),
        cross_attention_dim=128,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )


# --- on a rank --------------------------------------------------------------------------------------------------------


def make(mesh: mc.ParallelMesh, name: str, pixels: int, degrees: dict[str, int]) -> Call:
    """A decode, or a step on both branches, split over the mesh of ``degrees``."""
    torch.manual_seed(0)
    model = {"decoder": decoder, "unet": unet}[name]().eval().requires_grad_(False)
    if degrees:
        mc.parallelize(model, mc.init_mesh(mc.ParallelConfig(**degrees)))
    if name == "decoder":
        latents = torch.randn(1, 4, pixels // 8, pixels // 8)
        return lambda: model.decode(latents).sample
    latents, words = torch.randn(2, 4, pixels // 8, pixels // 8), torch.randn(2, 77, 128)
    conditions = {"text_embeds": torch.randn(2, 16), "time_ids": torch.rand(2, 6)}
    return lambda: model(latents, torch.tensor(5), words, added_cond_kwargs=conditions).sample


def run(mesh: mc.ParallelMesh, call: Call, exchanges: bool = True) -> None:
    with torch.no_grad(), contextlib.nullcontext() if exchanges else without_exchanges():
        call()
    collectives.barrier(mesh.world)


def error(mesh: mc.ParallelMesh, call: Call, name: str, pixels: int) -> float:
    """The largest difference from one rank's, relative to the largest value."""
    with torch.no_grad():
        wanted: Any = make(mc.single(), name, pixels, {})()
        got: Any = call()
    return float((got - wanted).abs().max() / wanted.abs().max())


def shares(mesh: mc.ParallelMesh, pixels: int, degrees: dict[str, int]) -> dict[str, tuple[float, float]]:
    """Seconds and MB of each component in one run of four steps."""
    torch.manual_seed(0)
    scheduler = diffusers.EulerDiscreteScheduler(steps_offset=1)
    pipe = diffusers.StableDiffusionXLPipeline(
        decoder(), None, None, None, None, unet(), scheduler, add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    if degrees:
        mc.parallelize(pipe, mc.init_mesh(mc.ParallelConfig(**degrees)))
    prompts = {"prompt_embeds": (1, 77, 128), "pooled_prompt_embeds": (1, 16)}
    embeds = {f"{sign}{name}": torch.randn(shape) for name, shape in prompts.items() for sign in ("", "negative_")}
    with timed(pipe.unet) as denoising, timed(pipe.vae.decoder) as decoding:
        start = time.perf_counter()
        pipe(**embeds, height=pixels, width=pixels, num_inference_steps=4, output_type="pt")
        whole = time.perf_counter() - start
    rest = whole - sum(denoising) - sum(decoding)
    return {
        "unet": (sum(denoising), held(pipe.unet) / 1e6),
        "vae": (sum(decoding), held(pipe.vae) / 1e6),
        "the rest": (rest, 0.0),
    }


@contextlib.contextmanager
def timed(module: torch.nn.Module) -> Iterator[list[float]]:
    """The seconds of each of its forwards."""
    begins: list[float] = []
    seconds: list[float] = []
    handles = [
        module.register_forward_pre_hook(lambda *_: begins.append(time.perf_counter())),
        module.register_forward_hook(lambda *_: seconds.append(time.perf_counter() - begins[-1])),
    ]
    yield seconds
    for handle in handles:
        handle.remove()


# --- the contest ------------------------------------------------------------------------------------------------------


def contest(name: str, pixels: int, rounds: int, backend: str) -> list[dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        start = functools.partial(mc.Ranks, timeout=300.0)
        one = stack.enter_context(start(mc.ParallelConfig(), threads_per_rank=1))
        wide = stack.enter_context(start(mc.ParallelConfig(), threads_per_rank=2))
        two = stack.enter_context(start(mc.ParallelConfig(dp=2), threads_per_rank=1, backend=backend))
        contestants, errors = {}, {}
        for label, ranks in (("1 process of 1 thread", one), ("1 process of 2 threads", wide)):
            contestants[label] = functools.partial(ranks.run, run, ranks.keep(make, name, pixels, {}))
        for degrees in MESHES[name]:
            label = ", ".join(f"{axis}={degree}" for axis, degree in degrees.items())
            kept = two.keep(make, name, pixels, degrees)
            errors[label] = max(two.run(error, kept, name, pixels))
            contestants[label] = functools.partial(two.run, run, kept)
            contestants[f"{label} bound"] = functools.partial(two.run, run, kept, False)
        times = alternate(contestants, rounds)
    return [
        {
            "what": f"{name} {pixels}²",
            "contestant": label,
            "ms": times[label] * 1e3,
            "of bound": times[f"{label} bound"] / times[label] if f"{label} bound" in times else "",
            "× 1 thread": times["1 process of 1 thread"] / times[label],
            "error": errors.get(label, ""),
        }
        for label in times
        if not label.endswith("bound")
    ]


def by_component(pixels: int, backend: str) -> list[dict[str, Any]]:
    rows = []
    meshes: dict[str, dict[str, int]] = {
        "1 process": {},
        **{f"{axis}=2": {axis: 2} for axis in ("cfg", "ulysses", "tp")},
    }
    for label, degrees in meshes.items():
        with mc.Ranks(mc.ParallelConfig(**degrees), timeout=300.0, threads_per_rank=1, backend=backend) as ranks:
            ranks.run(shares, pixels, degrees)
            found = ranks.run(shares, pixels, degrees)[0]
        whole = sum(seconds for seconds, _ in found.values())
        rows += [
            {"mesh": label, "component": name, "s": seconds, "share": seconds / whole, "MB a rank": megabytes}
            for name, (seconds, megabytes) in found.items()
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pixels", type=int, default=512, help="height and width of pictures")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = [row for name in MESHES for row in contest(name, args.pixels, args.rounds, args.backend)]
    components = by_component(args.pixels // 2, args.backend)
    about = {"components": components} if args.json else {}
    report(rows, args.json, diffusers=diffusers.__version__, rounds=args.rounds, **about)
    if not args.json:
        print_table(components)


if __name__ == "__main__":
    main()
