"""The process that compiles a decoder's stages: `python -m multicard.models.compiler`, started by a rank.

It has no weights and loads none: shapes are all that it needs. It ends when the rank that started it does.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from typing import Any

import torch

from multicard import mesh as meshes
from multicard.axis import Axis
from multicard.layers.rows import few_rows
from multicard.models import artifacts, stages
from multicard.models.decoder import ParallelTransformer
from multicard.models.load import MULTIPLYING
from multicard.models.outline import declare
from multicard.quantized.weight import blocks_of

OPTIONS = {
    "realize_reads_threshold": 1,  # a norm is computed once, not again in the inner loop of each product
    "realize_opcount_threshold": 1 << 20,  # and what blocks hold never goes to memory
    "realize_acc_reads_threshold": 1 << 20,
}


def outline(
    checkpoint: str, rank: int, size: int, sequence: int, dtype: torch.dtype, quantize: str | None = None
) -> ParallelTransformer:
    """What rank ``rank`` of ``size`` has of the decoder, without memory."""
    mesh = dataclasses.replace(meshes.single(), tp=Axis("tp", rank, size), sequence=Axis("sequence", 0, sequence))
    return declare(checkpoint, mesh, dtype, quantize)


def multiply_few_rows(model: ParallelTransformer) -> None:
    for module in model.modules():
        if isinstance(module, MULTIPLYING):
            blocks = blocks_of(module.weight)
            module.multiply = few_rows if blocks is None else blocks.few_rows


def compile_stages(model: ParallelTransformer, rows: int, folder: pathlib.Path, work: str) -> None:
    """Compile those that aren't in ``folder`` yet, with all files in between in ``work``, on the same file system."""
    multiply_few_rows(model)
    for stage in stages.different(model, rows):
        target = artifacts.path_of(folder, stage.name)
        if target.exists():
            continue
        arguments = stages.example(stage, model, rows)
        shapes: Any = ([{}] * len(arguments[0]), tuple(stages.varying(stage)), {}, {})
        exported = torch.export.export(stages.Applied(stage), arguments, dynamic_shapes=shapes, strict=False)
        made = os.path.join(work, target.name)
        options = OPTIONS | {"aot_inductor.output_path": made}
        torch._inductor.aot_compile(exported.module(), arguments, options=options)
        os.replace(made, target)  # at once: one that is there is whole


def main() -> None:
    asked: dict[str, Any] = json.loads(sys.stdin.readline())
    folder = pathlib.Path(asked["target"])
    for left in folder.glob("work*"):  # by one that was killed: this process has the folder to itself
        shutil.rmtree(left, ignore_errors=True)
    work = tempfile.mkdtemp(prefix="work", dir=folder)
    threading.Thread(target=_end_with_parent, args=(work,), daemon=True).start()
    tempfile.tempdir = os.environ["TORCHINDUCTOR_CACHE_DIR"] = work  # others can write to /tmp
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    degrees = asked["rank"], asked["size"], asked["sequence"]
    model = outline(asked["checkpoint"], *degrees, getattr(torch, asked["dtype"]), asked["quantize"])
    try:
        with torch.no_grad():
            compile_stages(model, asked["rows"], folder, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _end_with_parent(work: str) -> None:
    sys.stdin.read()
    shutil.rmtree(work, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)  # this process and its C++ compiler


if __name__ == "__main__":
    main()
