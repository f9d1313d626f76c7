"""A diffusers script for one card, and the two lines that make it parallel.

python examples/two_lines.py three.png                         # one card
multicard run --cfg 2 examples/two_lines.py three.png          # two
"""

import sys

import torch
from diffusers import DiTPipeline

import multicard as mc

pipe = DiTPipeline.from_pretrained("examples/digits/pipeline", use_safetensors=True)

mesh = mc.init_mesh()  # the degrees given to `multicard run`, or one rank
mc.parallelize(pipe, mesh)

images = pipe(class_labels=[3], guidance_scale=2.0, num_inference_steps=20, generator=torch.manual_seed(0)).images
if mesh.rank == 0:
    images[0].save(sys.argv[1])
