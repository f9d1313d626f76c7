"""``multicard run``: a script on every rank of a mesh, like torchrun, with our supervision."""

from __future__ import annotations

from typing import Annotated

import typer

from multicard.cli import options
from multicard.config import ParallelConfig
from multicard.errors import ConfigError

CONTEXT = {"allow_interspersed_args": False, "ignore_unknown_options": False}


def run(
    script: Annotated[str, typer.Argument(help="The Python file to run on every rank.", show_default=False)],
    args: Annotated[list[str] | None, typer.Argument(help="Its arguments.", show_default=False)] = None,
    tp: options.Tp = 1,
    ulysses: options.Ulysses = 1,
    ring: options.Ring = 1,
    cfg: options.Cfg = 1,
    dp: options.Dp = 1,
    timeout: options.Timeout = 60.0,
    device: options.Device = "auto",
    backend: options.Backend = "auto",
    check: options.Check = False,
    log_dir: options.LogDir = None,
) -> None:
    """Run SCRIPT on every rank of the mesh; inside it, mc.init_mesh() joins."""
    config = ParallelConfig(tp=tp, ulysses=ulysses, ring=ring, cfg=cfg, dp=dp)
    raise ConfigError(f"multicard run {script} on {config}: coming within the hour")
