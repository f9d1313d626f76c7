"""Sample a grid of digits on several ranks, and say how it differs from one process's.

python examples/digits/sample.py --cfg 2 --output out/digits.png
"""

import argparse
import pathlib
import sys

import numpy as np
import torch
from diffusers import DiTPipeline
from PIL import Image

import multicard as mc

FOLDER = pathlib.Path(__file__).parent / "pipeline"
EXACT = 1e-4


def grid(images: np.ndarray, columns: int, zoom: int = 2) -> Image.Image:
    """Pictures ``(N, height, width, 1)`` in [0, 1], a row of ``columns`` after the other, as one."""
    rows = [np.concatenate(list(row), axis=1) for row in images.reshape(-1, columns, *images.shape[1:3])]
    pixels = (np.concatenate(rows) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels).resize((pixels.shape[1] * zoom, pixels.shape[0] * zoom), Image.Resampling.BICUBIC)


def one_process(arguments: dict, seed: int) -> np.ndarray:
    """The same pictures by diffusers alone."""
    pipe = DiTPipeline.from_pretrained(FOLDER, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe(**arguments, generator=torch.Generator().manual_seed(seed)).images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for axis in ("cfg", "ulysses", "ring", "tp"):
        parser.add_argument(f"--{axis}", type=int, default=2 if axis == "cfg" else 1)
    parser.add_argument("--rows", type=int, default=4, help="of ten digits each")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("out/digits.png"))
    args = parser.parse_args()
    arguments = {
        "class_labels": list(range(10)) * args.rows,
        "guidance_scale": args.guidance,
        "num_inference_steps": args.steps,
        "output_type": "np",
    }
    degrees = {axis: getattr(args, axis) for axis in ("cfg", "ulysses", "ring", "tp")}
    with mc.DiffusionPipeline(FOLDER, **degrees) as pipe:
        images = np.asarray(pipe(**arguments, seed=args.seed).images)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    grid(images, columns=10).save(args.output)
    difference = float(np.abs(images - one_process(arguments, args.seed)).max())
    ranks = " ".join(f"{axis}={degree}" for axis, degree in degrees.items() if degree > 1) or "one rank"
    print(f"{args.output}: {len(images)} digits on {ranks}; largest difference from one process: {difference:.1e}")
    if difference > EXACT:
        sys.exit(f"which is more than {EXACT}")


if __name__ == "__main__":
    main()
