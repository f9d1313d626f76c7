"""Train the digits pipeline: a class-conditional DiT on scikit-learn's 8x8 digits, saved as a diffusers `DiTPipeline`.

    python examples/digits/train.py --out examples/digits/pipeline        # some ten minutes of one CPU core

The latents are the 8x8 pixels themselves, so there is nothing to encode; the VAE's decoder learns to enlarge them four
times, smoothly. The transformer learns to remove noise (DDPM, arXiv 2006.11239, velocity target of arXiv 2202.00512)
and sees no label one time in ten, which is what classifier-free guidance (arXiv 2207.12598) needs at sampling time.
"""

import argparse
import copy
import time

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from sklearn.datasets import load_digits

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NO_LABEL = 1000  # the class that DiTPipeline passes for "any"


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The 1797 digits: pixels (1797, 1, 8, 8) in [-1, 1] and labels (1797,)."""
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)


def make_transformer() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=1,
        out_channels=1,
        num_layers=6,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=NO_LABEL,
    )


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=1.0,
    )


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")


def train_vae(vae: AutoencoderKL, pixels: torch.Tensor, steps: int) -> float:
    """Teach the decoder to enlarge, and the encoder to undo it; returns the last loss."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        small = pixels[torch.randint(len(pixels), (16,))]
        small = (small + 0.05 * torch.randn_like(small)).clamp(-1, 1)
        large = F.interpolate(small, scale_factor=4, mode="bicubic").clamp(-1, 1)
        loss = F.mse_loss(vae.decode(small).sample, large) + F.mse_loss(vae.encode(large).latent_dist.mean, small)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


def train_transformer(
    model: DiTTransformer2DModel, pixels: torch.Tensor, labels: torch.Tensor, steps: int, batch: int
) -> DiTTransformer2DModel:
    """Teach ``model`` to predict the velocity; returns the average of its weights over the last steps."""
    noising = make_scheduler()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    start, running = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        picked = torch.randint(len(pixels), (batch,))
        label = labels[picked].masked_fill(torch.rand(batch) < 0.1, NO_LABEL)
        noise, t = torch.randn(batch, 1, 8, 8), torch.randint(1000, (batch,))
        noisy = noising.add_noise(pixels[picked], noise, t)
        loss = F.mse_loss(model(noisy, t, label).sample, noising.get_velocity(pixels[picked], noise, t))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for kept, new in zip(average.parameters(), model.parameters(), strict=True):
            kept.lerp_(new, max(0.002, 1 / step))
        running += 0.01 * (loss.item() - running) if step > 1 else loss.item()
        if step % 200 == 0:
            print(f"step {step:5d}  loss {running:.4f}  {time.monotonic() - start:.0f} s", flush=True)
    return average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="examples/digits/pipeline")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pixels, labels = digits()
    vae = make_vae()
    print(f"VAE: loss {train_vae(vae, pixels, 1500):.5f}", flush=True)
    transformer = make_transformer().eval()  # eval: the blocks' own label dropout would drop each layer's by itself
    with torch.no_grad():
        for block in transformer.transformer_blocks:  # rows of classes that don't exist: zeros, to pack well
            block.norm1.emb.class_embedder.embedding_table.weight[len(NAMES) : NO_LABEL] = 0
    transformer = train_transformer(transformer, pixels, labels, args.steps, args.batch)
    pipe = DiTPipeline(transformer, vae.eval(), make_scheduler(), id2label=dict(enumerate(NAMES)))
    pipe.to(torch.float16).save_pretrained(args.out)  # half the bytes; loads as float32


if __name__ == "__main__":
    main()
