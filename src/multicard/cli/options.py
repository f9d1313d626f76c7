"""Options that several commands share; each is defined here once."""

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
Backend = Annotated[str, typer.Option("--backend", help="auto, shm, gloo, or another backend of torch.distributed.")]
Check = Annotated[bool, typer.Option("--check", help="Compare every collective across ranks before it runs.")]
CompareInputs = Annotated[
    bool, typer.Option(help="Compare inputs across the ranks of one request before they are used.")
]
LogDir = Annotated[str | None, typer.Option("--log-dir", help="Folder for a log of every rank's output.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output and nothing else.")]
