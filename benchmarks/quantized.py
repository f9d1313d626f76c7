"""Decoding with the blocks of quantised folders: SmolLM2 as GPTQ and FP8, against GGUF files of as many bits.

    python benchmarks/quantized.py

The folders are written when first needed: GPTQ's format with 4 bits and groups of 128, the head with 8 bits, rounded to
the nearest without data; and fine-grained FP8 in squares of 128. Contestants alternate in one run; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import statistics
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from common import report
from decode import NEW, PROMPT, Ours
from llama_cpp import ROOT, weights

GROUP = 128
PEERS = {"gptq": "Q4_1", "fp8": "Q8_0"}
CONFIGS = {
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "lm_head": True,
        "dynamic": {"lm_head": {"bits": 8}},
    },
    "fp8": {"quant_method": "fp8", "weight_block_size": [GROUP, GROUP], "modules_to_not_convert": []},
}


def gptq(weight: Tensor, bits: int) -> dict[str, Tensor]:
    """A matrix in GPTQ's format, each group from its least to its largest number."""
    inputs = weight.shape[1]
    grouped = torch.nn.functional.pad(weight, (0, -inputs % GROUP)).unflatten(1, (-1, GROUP))
    least, most = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scales = ((most - least) / (2**bits - 1)).half()
    zeros = (-least / scales.float()).round().clamp(1, 2**bits - 1)
    codes = (grouped / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 2**bits - 1)
    return {
        "qweight": _words(codes.flatten(1)[:, :inputs].int(), bits).T.contiguous(),
        "qzeros": _words(zeros.T.int() - 1, bits),
        "scales": scales.T.contiguous(),
    }


def fp8(weight: Tensor, bits: int) -> dict[str, Tensor]:
    """A matrix in FP8, the largest number of each square as the largest of FP8."""
    outputs, inputs = weight.shape
    squares = torch.nn.functional.pad(weight, (0, -inputs % GROUP, 0, -outputs % GROUP))
    squares = squares.unflatten(1, (-1, GROUP)).unflatten(0, (-1, GROUP))
    scales = (squares.abs().amax((1, 3)) / 448).bfloat16()
    codes = squares / scales.float()[:, None, :, None]
    codes = codes.clamp(-448, 448).to(torch.float8_e4m3fn).flatten(2).flatten(0, 1)
    return {"weight": codes[:outputs, :inputs].contiguous(), "weight_scale_inv": scales}


def _words(codes: Tensor, bits: int) -> Tensor:
    held = 32 // bits
    codes = codes.unflatten(-1, (-1, held)) << torch.arange(0, 32, bits, dtype=torch.int32)
    return codes.sum(-1).to(torch.int32)


def folder(model: str, kind: str) -> pathlib.Path:
    """SmolLM2 in that format, in a folder of its own, with a head of its own."""
    source, target = pathlib.Path(model), ROOT / ".cache" / f"smollm2-{kind}"
    if (target / "config.json").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    held = safetensors.torch.load_file(source / "model.safetensors")
    for name, tensor in {**held, "lm_head.weight": held["model.embed_tokens.weight"]}.items():
        module = name.removesuffix(".weight")
        if module == "lm_head" or module.endswith("proj"):
            made = {"gptq": gptq, "fp8": fp8}[kind](tensor.float(), 8 if module == "lm_head" else 4)
            tensors |= {f"{module}.{leaf}": each for leaf, each in made.items()}
        else:
            tensors[name] = tensor.clone()
    safetensors.torch.save_file(tensors, target / "model.safetensors")
    for path in source.glob("*token*.json"):
        shutil.copy(path, target)
    config = json.loads((source / "config.json").read_text())
    config |= {"tie_word_embeddings": False, "quantization_config": CONFIGS[kind]}
    (target / "config.json").write_text(json.dumps(config))
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / ".cache" / "smollm2"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, len(os.sched_getaffinity(0))}))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    ids = list(range(100, 100 + PROMPT))
    running: dict[str, Any] = {}
    for kind, peer in PEERS.items():
        for count in args.threads:
            running[f"{kind}, {count} threads"] = Ours(str(folder(args.model, kind)), "float32", 1, count)
            running[f"{peer}, {count} threads"] = Ours(str(weights(peer)), "float32", 1, count)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
    for _ in range(args.rounds):
        for name, contestant in running.items():
            times[name].append(contestant.run(ids, NEW))
    rows = []
    for name, each in times.items():
        prefill, decode = (statistics.median(column) for column in zip(*each, strict=True))
        size = running[name].weights / (1 << 20)
        rows.append({"who": name, "MiB": size, "prefill ms": prefill * 1e3, "tokens/s": 1 / decode})
        running[name].close()
    report(rows, args.json, model=args.model, new=NEW, rounds=args.rounds, prompt=PROMPT)


if __name__ == "__main__":
    main()
