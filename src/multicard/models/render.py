"""The process that renders chat templates: they are code from a download, so they get little time, memory and output.

It runs as a script, imports jinja2 and nothing of multicard, reads a request a line on standard input, and answers each
with a line: what was rendered, or why not.
"""

from __future__ import annotations

import datetime
import functools
import json
import resource
import sys
import time
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 5  # of processor time, for one prompt
MEMORY = 1 << 30  # bytes of address space
CHARACTERS = 1 << 24  # of output


class Refused(TemplateError):
    """The template's own ``raise_exception``: it doesn't take such messages."""


class GenerationTag(Extension):
    """``{% generation %}`` marks what an assistant said, for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012  jinja2's interface

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message: object) -> NoReturn:
    raise Refused(str(message))


def now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


@functools.lru_cache(1)
def compiled(text: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": now}
    return environment.from_string(text)


def render(request: dict[str, Any]) -> str:
    pieces, length = [], 0
    for piece in compiled(request["template"]).generate(request["context"]):
        pieces.append(piece)
        length += len(piece)
        if length > CHARACTERS:
            raise MemoryError(f"more than {CHARACTERS} characters of output")
    return "".join(pieces)


def answer(line: str) -> dict[str, str]:
    try:
        return {"text": render(json.loads(line))}
    except Refused as error:
        return {"refused": str(error)}
    except MemoryError as error:
        return {"error": str(error) or f"more than {MEMORY >> 20} MiB of memory"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + SECONDS + 1, resource.RLIM_INFINITY))
        print(json.dumps(answer(line)), flush=True)


if __name__ == "__main__":
    main()
