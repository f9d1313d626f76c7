"""``multicard run``: runs a script on every rank of a mesh, like torchrun, but supervised."""

from __future__ import annotations

import socket
import sys
from typing import Annotated, Any

import typer

from multicard.cli import options
from multicard.config import ParallelConfig
from multicard.errors import ConfigError

CONTEXT = {"allow_interspersed_args": False}  # arguments after the script are the script's

Nodes = Annotated[
    int, typer.Option("--nnodes", envvar="SLURM_STEP_NUM_NODES", help="Number of hosts; run the same command on each.")
]
NodeRank = Annotated[int, typer.Option("--node-rank", envvar="SLURM_NODEID", help="This host's number, from 0.")]
Address = Annotated[
    str | None,
    typer.Option("--master-addr", envvar="MASTER_ADDR", help="Address of host 0 that the other hosts can reach."),
]
Port = Annotated[int | None, typer.Option("--master-port", envvar="MASTER_PORT", help="A free port on host 0.")]
Interface = Annotated[
    str | None, typer.Option("--interface", help="Network interface for gloo; default: the one that leads to host 0.")
]
Console = Annotated[str, typer.Option("--console", help="Which ranks' output to print here: rank0, all or none.")]


@options.starts_ranks("tp", "ulysses", "ring", "cfg", "dp")
def run(
    *,
    script: Annotated[str, typer.Argument(help="The Python file to run on every rank.", show_default=False)],
    args: Annotated[list[str] | None, typer.Argument(help="Its arguments.", show_default=False)] = None,
    degrees: dict[str, Any],
    ranks: dict[str, Any],
    console: Console = "rank0",
    nnodes: Nodes = 1,
    node_rank: NodeRank = 0,
    master_addr: Address = None,
    master_port: Port = None,
    interface: Interface = None,
) -> None:
    """Run SCRIPT with ARGS on every rank of the mesh, like torchrun; inside it, mc.init_mesh() joins.

    With --nnodes, run the same command on every host; each starts its share of the ranks.
    """
    from multicard.place import slurm_store
    from multicard.ranks.hosts import Hosts
    from multicard.ranks.script import run_script
    from multicard.ranks.settings import Settings

    hosts = Hosts()
    if nnodes > 1:
        address, port = slurm_store()
        address, port = master_addr or address, port if master_port is None else master_port
        hosts = Hosts(nnodes, node_rank, _resolve(address), port, interface)
    settings = Settings(ParallelConfig(**degrees), console=console, hosts=hosts, **ranks)
    try:
        run_script(script, args or [], settings)
    except Exception as error:
        for note in getattr(error, "__notes__", []):  # the traceback of the script, or every rank's stack
            print(note, file=sys.stderr)
        raise


def _resolve(name: str) -> str:
    try:
        return socket.gethostbyname(name)
    except OSError as error:
        raise ConfigError(f"--master-addr {name}: {error.strerror or error}") from None
