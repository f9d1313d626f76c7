"""Options that commands share, so that each is spelled, described and checked in one place."""

from __future__ import annotations

from typing import Annotated

import typer

Tp = Annotated[int, typer.Option("--tp", help="Tensor-parallel ranks.")]
Ulysses = Annotated[int, typer.Option("--ulysses", help="Ulysses sequence-parallel ranks.")]
Ring = Annotated[int, typer.Option("--ring", help="Ring sequence-parallel ranks.")]
Cfg = Annotated[int, typer.Option("--cfg", help="Ranks over guidance branches.")]
Dp = Annotated[int, typer.Option("--dp", help="Data-parallel replicas.")]

Timeout = Annotated[float, typer.Option("--timeout", help="Seconds that one collective may wait.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, npu or xpu.")]
Backend = Annotated[str, typer.Option("--backend", help="auto, shm, gloo, or one that torch.distributed knows.")]
Check = Annotated[bool, typer.Option("--check", help="Compare every collective between ranks before it runs.")]
CompareInputs = Annotated[bool, typer.Option(help="Compare what ranks of one request are given before they use it.")]
LogDir = Annotated[str | None, typer.Option("--log-dir", help="Folder for every rank's own output.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output and nothing else.")]
