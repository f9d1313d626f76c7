"""``multicard image``: draws with a diffusers pipeline."""

from __future__ import annotations

import json
import pathlib
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from multicard.cli import early, options
from multicard.errors import ConfigError, UnsupportedError
from multicard.extras import need

if TYPE_CHECKING:
    from multicard.diffusion import DiffusionPipeline

Prompts = Annotated[
    list[str] | None, typer.Argument(help="What to draw; several prompts are one batch.", show_default=False)
]
Negative = Annotated[str | None, typer.Option("--negative-prompt", help="What not to draw.")]
Labels = Annotated[
    list[int] | None,
    typer.Option("--class-label", help="Number of a class to draw; may be repeated: several are one batch."),
]
Explain = Annotated[bool, typer.Option("--explain", help="Say how each component is divided over the ranks.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="NAME=VALUE: any other argument of the pipeline; VALUE is JSON.")
]


@options.starts_ranks("cfg", "ring", "ulysses", "tp", "dp")
def image(
    *,
    model: Annotated[str, typer.Option("--model", help="A diffusers pipeline folder.", show_default=False)],
    prompts: Prompts = None,
    degrees: dict[str, Any],
    negative_prompt: Negative = None,
    class_label: Labels = None,
    steps: Annotated[int | None, typer.Option("--steps", help="num_inference_steps; default: the pipeline's.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the pipeline's.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; default: the pipeline's.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; default: the pipeline's.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames of a video; default: the pipeline's.")] = None,
    set_: Set = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same picture at every degree.")] = 0,
    output: Annotated[
        str, typer.Option("--output", "-o", help="The file to write; several pictures get numbered files.")
    ] = "image.png",
    variant: Annotated[
        str | None, typer.Option(help="Which of several sets of weight files to load, for example fp16.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow Python code in the folder to run.")
    ] = False,
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", help="A LoRA's safetensors file, or a folder with one; may be repeated."),
    ] = None,
    dtype: options.Dtype = "auto",
    explain: Annotated[
        bool, typer.Option("--explain", help="say how each component is divided over the ranks")
    ] = False,
    ranks: dict[str, Any],
    as_json: options.Json = False,
) -> None:
    """Draw PROMPTS with a diffusers pipeline, split over ranks; videos become animated pictures."""
    early.prepare("multicard.diffusion", "diffusers.pipelines.pipeline_utils", **degrees)
    from multicard import place
    from multicard.diffusion import DiffusionPipeline
    from multicard.integrations.diffusers.request import check_request

    target = _target(output)
    asked = {
        "prompt": _one_or_list([early.text(prompt) for prompt in prompts or []]),
        "negative_prompt": _one_or_list([negative_prompt] * max(1, len(prompts or []))),
        "class_labels": class_label or None,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
        "num_frames": num_frames,
        **_settings(set_ or []),
    }
    check_request(asked)  # before minutes of loading
    begin = time.perf_counter()
    with DiffusionPipeline(
        model, dtype=dtype, variant=variant, trust_remote_code=trust_remote_code, lora=lora or (), **degrees, **ranks
    ) as pipe:
        loaded = time.perf_counter()
        arguments = {name: value for name, value in asked.items() if value is not None}
        if "output_type" in pipe.parameters:
            arguments.setdefault("output_type", "pil")
        found = pipe(**arguments, seed=seed)
        drawn = time.perf_counter()
        if not place.is_first():
            return
        files = _save(found, target)
        if as_json:
            timings = {"load": loaded - begin, "generate": drawn - loaded}
            about = {"seed": seed, "mesh": pipe.degrees.degrees, "components": _components(pipe), "timings": timings}
            print(json.dumps({"files": files, **about}))
        else:
            print("\n".join(files))
            print(_explained(pipe) if explain else _held(pipe), file=sys.stderr)


def _components(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Of each component, by name: bytes that every rank has read and holds, by rank, and why it is whole."""
    return {
        name: {
            "read": [rank[name].read for rank in pipe.load_reports],
            "held": [rank[name].held for rank in pipe.load_reports],
            "how": first.how,
            "whole": first.whole,
        }
        for name, first in pipe.load_reports[0].items()
    }


def _held(pipe: DiffusionPipeline) -> str:
    """The same in one line: the most that a rank holds of each component."""
    found = _components(pipe)
    parts = [
        f"{name} {max(each['held']) / 1e9:.3g}{' (whole)' if each['whole'] else ''}" for name, each in found.items()
    ]
    total = sum(max(each["held"]) for each in found.values())
    return f"a rank holds at most {total / 1e9:.3g} GB: {', '.join(parts)}"


def _explained(pipe: DiffusionPipeline) -> str:
    """How each component is divided over the ranks, one a line."""
    lines = []
    for name, each in _components(pipe).items():
        why = f"; {each['whole']}" if each["whole"] else ""
        lines.append(
            f"{name}: {each['how'] or 'nothing is divided'}{why}; a rank holds {max(each['held']) / 1e9:.3g} GB"
        )
    return "\n".join(lines)


def _one_or_list(prompts: list[Any]) -> Any:
    return prompts if len(prompts) > 1 and prompts[0] is not None else next(iter(prompts), None)


def _target(output: str) -> pathlib.Path:
    """The file to write. Raises ConfigError for a kind that can't be, before anything is drawn."""
    need("PIL", "writing pictures")
    from PIL import Image

    path = pathlib.Path(output)
    kinds = Image.registered_extensions()
    if kinds.get(path.suffix.lower()) not in Image.SAVE:
        raise ConfigError(f"--output {output}: unknown file type; use for example .png, .jpg, .webp or .gif")
    return path


def _settings(given: list[str]) -> dict[str, Any]:
    """Arguments from NAME=VALUE; a VALUE that isn't JSON is text."""
    found = {}
    for setting in given:
        name, equals, value = setting.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--set {setting}: must be NAME=VALUE")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _save(found: Any, target: pathlib.Path) -> list[str]:
    """Write pictures, or videos as lists of pictures, to a file each; returns the files' names."""
    pictures = getattr(found, "images", None)
    pictures = pictures if pictures is not None else getattr(found, "frames", None)
    if not isinstance(pictures, list) or not pictures:
        raise UnsupportedError(
            f"the pipeline gave {', '.join(vars(found))} but no pictures to save: call mc.DiffusionPipeline from Python"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    files = []
    for i, picture in enumerate(pictures):
        file = target if len(pictures) == 1 else target.with_stem(f"{target.stem}-{i}")
        first, *rest = picture if isinstance(picture, list) else [picture]
        first.save(file, **({"save_all": True, "append_images": rest} if rest else {}))
        files.append(str(file))
    return files
