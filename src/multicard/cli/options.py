"""Options that several commands share; each is defined here once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output and nothing else.")]

DEGREES = {
    "tp": "Tensor-parallel ranks.",
    "ulysses": "Ulysses sequence-parallel ranks.",
    "ring": "Ring sequence-parallel ranks.",
    "cfg": "Ranks over guidance branches.",
    "dp": "Data-parallel replicas.",
}
Options = dict[str, tuple[Any, object]]
"""Types and defaults, by parameter."""
RANKS: Options = {
    "timeout": (Annotated[float, typer.Option(help="Seconds that one collective may wait.")], 60.0),
    "device": (Annotated[str, typer.Option(help="auto, cpu, cuda, npu or xpu.")], "auto"),
    "backend": (
        Annotated[str, typer.Option(help="auto, shm, gloo, or one that torch.distributed knows.")],
        "auto",
    ),
    "check": (
        Annotated[bool, typer.Option("--check", help="Compare every collective between ranks before it runs.")],
        False,
    ),
    "compare_inputs": (
        Annotated[bool, typer.Option(help="Compare what ranks of one request are given before they use it.")],
        True,
    ),
    "log_dir": (Annotated[str | None, typer.Option(help="Folder for every rank's own output.")], None),
}


def starts_ranks(*axes: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of all that start ranks, in place of two parameters of its own.

    Its ``degrees`` are those of the mesh ``axes`` by name, its ``ranks`` those of ``RANKS``.
    """
    added: dict[str, Options] = {
        "degrees": {axis: (Annotated[int, typer.Option(help=DEGREES[axis])], 1) for axis in axes},
        "ranks": RANKS,
    }

    def give(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def given(**values: Any) -> None:
            groups = {group: {name: values.pop(name) for name in names} for group, names in added.items()}
            command(**values, **groups)

        parameters: list[inspect.Parameter] = []
        for own in inspect.signature(command, eval_str=True).parameters.values():
            shared = added.get(own.name, {own.name: (own.annotation, own.default)})
            parameters += [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
                for name, (annotation, default) in shared.items()
            ]
        given.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        given.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return given

    return give
