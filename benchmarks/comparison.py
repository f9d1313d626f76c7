"""What it costs that ranks compare their inputs: a call of a denoiser, a scheduler's step, a model's forward.

    python benchmarks/comparison.py --rounds 7

Inputs are as large as those of the models named; "of 20 ms" is what the comparison adds to a step of 20 ms that makes
one call of the denoiser and one of its scheduler. Beside it whole runs of the digits pipeline with and without.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from typing import Any

import torch

import multicard as mc
from common import alternate, report
from multicard import collectives
from multicard.replica import Replica

DIGITS = pathlib.Path(__file__).parents[1] / "examples" / "digits" / "pipeline"
STEP_MS = 20.0
CALLS, STEPS = 100, 10


def inputs(name: str) -> dict[str, Any]:
    """What a rank is given at such a point."""
    noise = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    return {
        "digits denoiser": {
            "hidden_states": noise(80, 1, 8, 8),
            "timestep": torch.full((80,), 500),
            "class_labels": torch.arange(80),
        },
        "digits scheduler": {"model_output": noise(40, 1, 8, 8), "timestep": 500, "sample": noise(40, 1, 8, 8)},
        "SDXL scheduler": {
            "model_output": noise(1, 4, 128, 128),
            "timestep": torch.tensor(500.0),
            "sample": noise(1, 4, 128, 128),
            "return_dict": False,
        },
        "FLUX denoiser": {
            "hidden_states": noise(1, 4096, 64).bfloat16(),
            "encoder_hidden_states": noise(1, 512, 4096).bfloat16(),
            "pooled_projections": noise(1, 768).bfloat16(),
            "timestep": torch.tensor([0.5]),
            "img_ids": torch.zeros(4096, 3),
            "txt_ids": torch.zeros(512, 3),
        },
        "LLM forward": {"input_ids": torch.tensor([[7]]), "attention_mask": torch.ones(1, 900), "use_cache": True},
    }[name]


POINTS = ("digits denoiser", "digits scheduler", "SDXL scheduler", "FLUX denoiser", "LLM forward")


def compare(mesh: mc.ParallelMesh, given: dict[str, Any]) -> None:
    replica = Replica(mesh)
    for _ in range(CALLS):
        replica.compare("here", given)


def gather(mesh: mc.ParallelMesh) -> None:
    """The bound: nothing but the exchange."""
    words = torch.zeros(mesh.tp.size, 3, dtype=torch.int64)
    for _ in range(CALLS):
        collectives.all_reduce(words, mesh.tp)


def nothing(mesh: mc.ParallelMesh) -> None:
    """What a call of the ranks costs by itself."""


def draw(mesh: mc.ParallelMesh, axis: str, compares: bool) -> Any:
    """The digits pipeline, split."""
    from diffusers import DiTPipeline

    pipe = DiTPipeline.from_pretrained(DIGITS, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    config = mc.ParallelConfig(**{axis: 2})
    return mc.parallelize(pipe, mc.init_mesh(config, compare_inputs=compares))


def run(mesh: mc.ParallelMesh, pipe: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    pipe(class_labels=list(range(10)) * 4, num_inference_steps=STEPS, generator=generator, output_type="np")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with mc.Ranks(mc.ParallelConfig(tp=2), threads_per_rank=1, backend=args.backend, timeout=120) as ranks:
        kept = {name: ranks.keep(lambda mesh, name=name: inputs(name)) for name in POINTS}
        contestants = {name: functools.partial(ranks.run, compare, kept[name]) for name in POINTS}
        contestants |= {"(the exchange alone)": lambda: ranks.run(gather), "": lambda: ranks.run(nothing)}
        times = alternate(contestants, args.rounds)
        idle = times.pop("")
        for name, seconds in times.items():
            us = (seconds - idle) / CALLS * 1e6
            rows.append({"point": name, "µs": us, "of 20 ms": f"{us / STEP_MS / 10:.2f} %", "with/without": ""})
        for axis in ("cfg", "ulysses"):
            pipes = {compares: ranks.keep(draw, axis, compares) for compares in (True, False)}
            found = alternate(
                {str(on): functools.partial(ranks.run, run, pipe) for on, pipe in pipes.items()}, args.rounds
            )
            step = found["False"] / STEPS
            rows.append(
                {
                    "point": f"digits, {axis}=2: {step * 1e3:.1f} ms a step",
                    "µs": (found["True"] - found["False"]) / STEPS * 1e6,
                    "of 20 ms": "",
                    "with/without": found["True"] / found["False"],
                }
            )
    report(rows, args.json, rounds=args.rounds)


if __name__ == "__main__":
    main()
