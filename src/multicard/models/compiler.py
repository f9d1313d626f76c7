"""The process that compiles a decoder's stages: `python -m multicard.models.compiler`, started by a rank.

It has no weights and loads none: shapes are all that it needs. It ends when the rank that started it does.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
import sys
import tempfile
import threading
import warnings
from typing import Any

import torch

from multicard import mesh as meshes
from multicard.axis import Axis
from multicard.layers.rows import one_row
from multicard.models import artifacts, stages
from multicard.models.config import DecoderConfig
from multicard.models.decoder import ParallelTransformer

OPTIONS = {
    "realize_reads_threshold": 0,  # a norm is computed once, not again in the inner loop of each product
    "aot_inductor.package": True,
}


def outline(folder: str, rank: int, size: int, dtype: torch.dtype) -> ParallelTransformer:
    """This rank's part of the decoder, without memory and with two layers: they have every kind of stage."""
    config = DecoderConfig.from_folder(folder)
    mesh = dataclasses.replace(meshes.single(), tp=Axis("tp", rank, size))
    two = dataclasses.replace(config, layers=min(config.layers, 2))
    return ParallelTransformer(two, mesh, dtype, device="meta")


def compile_stages(model: ParallelTransformer, folder: pathlib.Path) -> None:
    """Compile those that aren't in ``folder`` yet."""
    for module in model.modules():
        if hasattr(module, "multiply"):
            module.multiply = one_row
    for stage in stages.different(model):
        target = artifacts.path_of(folder, stage.name)
        if not target.exists():
            exported = torch.export.export(stages.Applied(stage), stages.example(stage, model), strict=False)
            with tempfile.TemporaryDirectory(dir=folder) as work:
                made = os.path.join(work, "made.pt2")
                torch._inductor.aoti_compile_and_package(exported, package_path=made, inductor_configs=OPTIONS)
                os.replace(made, target)  # at once: one that is there is whole


def main() -> None:
    asked: dict[str, Any] = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(asked["nice"])
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    model = outline(asked["checkpoint"], asked["rank"], asked["size"], getattr(torch, asked["dtype"]))
    with torch.no_grad():
        compile_stages(model, pathlib.Path(asked["target"]))


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
