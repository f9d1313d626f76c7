"""One picture encoded and decoded on one rank and, by rows, on three; the difference beside them, made visible.

python examples/rows.py out/rows.png
"""

import pathlib
import sys

import torch
from diffusers import AutoencoderKL, DiTPipeline
from PIL import Image

import multicard as mc

FOLDER = "examples/digits/pipeline"
SCALE = 8  # screen pixels a pixel


@torch.no_grad()
def there_and_back(mesh, picture):
    vae = AutoencoderKL.from_pretrained(FOLDER, subfolder="vae", use_safetensors=True)
    mc.parallelize(vae, mesh)  # rows of pictures over all ranks
    return vae.decode(vae.encode(picture).latent_dist.mode()).sample[0, 0]


def grey(values):
    """Numbers from 0 to 1 as a picture."""
    pixels = (values.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((pixels.shape[1] * SCALE, pixels.shape[0] * SCALE), Image.NEAREST)


def main(path):
    pipe = DiTPipeline.from_pretrained(FOLDER, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(class_labels=[8], num_inference_steps=20, generator=torch.manual_seed(0), output_type="np").images
    picture = torch.tensor(drawn).permute(0, 3, 1, 2)[:, :1] * 2 - 1
    one = there_and_back(mc.single(), picture)
    three = mc.launch(there_and_back, mc.ParallelConfig(ring=3), args=(picture,))[0]
    difference = (one - three).abs()
    panels = [grey(one / 2 + 0.5), grey(three / 2 + 0.5), grey(difference / difference.max().clamp(min=1e-9))]
    width, height = panels[0].size
    page = Image.new("L", (3 * width + 2 * SCALE, height), 255)
    for i, panel in enumerate(panels):
        page.paste(panel, (i * (width + SCALE), 0))
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
    print(f"the largest difference is {difference.max() / one.abs().max():.1e} of the largest value")


if __name__ == "__main__":
    main(sys.argv[1])
