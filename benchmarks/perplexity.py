"""How much rounding costs: a real model's perplexity on the repository's own pages, docs/*.md.

    python benchmarks/perplexity.py [--model .cache/smollm2] [--gguf .cache/smollm2.gguf] [--tokens 512]

The text is cut into windows of so many tokens, each read from its beginning; of each the second half is counted, whose
tokens have at least half a window before them. Perplexity is exp of the mean of -log p(token | those before it).
"""

from __future__ import annotations

import argparse
import math
import pathlib
from typing import Any

import torch
import torch.nn.functional as F

import multicard as mc
from common import report

PAGES = pathlib.Path(__file__).parents[1] / "docs"


def contestants(args: argparse.Namespace) -> dict[str, tuple[str, dict[str, Any]]]:
    """Paths and options of LLM. The first is what all are compared with; float32 comes before bfloat16."""
    found: dict[str, tuple[str, dict[str, Any]]] = {
        "folder, float32": (args.model, {"dtype": "float32"}),
        "folder, bfloat16": (args.model, {"dtype": "bfloat16"}),
    }
    for name in ("int8", "int4"):
        for dtype in ("float32", "bfloat16"):
            found[f"folder, {name}, {dtype}"] = args.model, {"dtype": dtype, "quantize": name}
    for dtype in ("float32", "bfloat16"):
        found[f"GGUF, {dtype}"] = args.gguf, {"dtype": dtype}
    return found


def windows(model: str, size: int, most: int) -> list[list[int]]:
    """The pages' token ids, ``size`` at a time; a rest that doesn't fill a window is left out."""
    from tokenizers import Tokenizer

    text = "\n\n".join(page.read_text(encoding="utf-8") for page in sorted(PAGES.glob("*.md")))
    ids = Tokenizer.from_file(str(pathlib.Path(model, "tokenizer.json"))).encode(text).ids
    return [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)][: most or None]


def perplexity(llm: mc.LLM, pieces: list[list[int]]) -> float:
    losses = []
    for ids in pieces:
        half = len(ids) // 2
        logits = llm.logits(ids)[half - 1 : -1]  # row n is about token n + 1
        losses.append(F.cross_entropy(logits.double(), torch.tensor(ids[half:])).item())
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".cache/smollm2")
    parser.add_argument("--gguf", default=".cache/smollm2.gguf")
    parser.add_argument("--tokens", type=int, default=512, help="in a window")
    parser.add_argument("--windows", type=int, default=24, help="how many; 0: all")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    pieces, rows = windows(args.model, args.tokens, args.windows), []
    exact: dict[Any, float] = {}
    for who, (path, options) in contestants(args).items():
        with mc.LLM(path, compile=False, **options) as llm:
            found = perplexity(llm, pieces)
        whole = exact.setdefault("folder", found)
        same = exact.setdefault((path, options.get("quantize")), found)  # in float32
        rows.append(
            {
                "who": who,
                "perplexity": found,
                "above the folder's": found / whole - 1,
                "above its float32": found / same - 1,
            }
        )
    report(rows, args.json, model=args.model, gguf=args.gguf, tokens=args.tokens, windows=len(pieces))


if __name__ == "__main__":
    main()
