"""``multicard generate``: answers prompts with a checkpoint."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from multicard.cli import early, options


@options.starts_ranks("tp", "ring", "ulysses", "dp")
def generate(
    *,
    prompts: Annotated[list[str], typer.Argument(help="What to answer; several are one batch.", show_default=False)],
    model: Annotated[
        str, typer.Option("--model", help="A Hugging Face checkpoint folder, or a GGUF file.", show_default=False)
    ],
    degrees: dict[str, Any],
    max_new_tokens: Annotated[int, typer.Option(help="New tokens for each prompt at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the likeliest tokens with probability p in total.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answer at every degree.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Continue after an end token.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Use no chat template: continue the text itself.")] = False,
    compile: Annotated[
        bool | None,
        typer.Option(
            help="Compile the decode step before the first answer, or not at all; else beside it, where there is a C++ "
            "compiler.",
            show_default=False,
        ),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            help="Draft tokens, for the same answer sooner: 'prompt' looks them up in it; a path is a smaller "
            "checkpoint.",
            show_default=False,
        ),
    ] = None,
    draft_tokens: Annotated[int, typer.Option(help="Tokens drafted in a step at most.")] = 7,
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", help="The folder of a LoRA adapter of peft's; may be repeated.", show_default=False),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(help="Round the weights as they are read: 'int8' or 'int4'.", show_default=False),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare the files with SHA256SUMS first.")] = False,
    dtype: options.Dtype = "auto",
    ranks: dict[str, Any],
    as_json: options.Json = False,
) -> None:
    """Answer PROMPTS with a checkpoint's decoder, split over ranks."""
    early.prepare("multicard.llm", **degrees)
    from multicard import place
    from multicard.llm import LLM
    from multicard.models.sampling import Sampling

    texts = [early.text(prompt) for prompt in prompts]

    class Asked(LLM):
        def _before_loading(self) -> None:
            if self.engine != "multicard":
                print(
                    f"{model}: not an architecture of multicard's own decoder, so it runs on {self.engine}",
                    file=sys.stderr,
                )
            self._request(texts, max_new_tokens, Sampling(temperature, top_k, top_p, seed), ignore_eos, raw)

    asked: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "ignore_eos": ignore_eos,
        "raw": raw,
    }
    compiles = "auto" if compile is None else compile
    loading: dict[str, Any] = {
        "dtype": dtype,
        "compile": compiles,
        "draft": draft,
        "draft_tokens": draft_tokens,
        "lora": lora or (),
        "quantize": quantize,
        "verify": verify,
    }
    with Asked(model, **loading, **degrees, **ranks) as llm:
        live = sys.stdout.isatty() and not as_json and not place.in_job()
        if live and len(prompts) == 1 and llm.tokenizer is not None:
            for piece in llm.stream(texts[0], **asked):
                print(piece, end="", flush=True)
            print()
            return
        answers = llm.generate(texts, **asked)
        if not place.is_first():
            return
        if as_json:
            print(json.dumps(_described(llm, answers)))
        else:
            print("\n\n".join(str(answer.text) for answer in answers))


def _described(llm: Any, answers: list[Any]) -> dict[str, Any]:
    """The fields of one answer, or of several as a list."""
    fields = ["text", "token_ids", "prompt_tokens", *(["drafted", "accepted"] if llm.draft else [])]
    each = [{field: getattr(answer, field) for field in fields} for answer in answers]
    reports = (llm.load_reports, llm.draft_load_reports)
    loading = sum(max((report.seconds for report in by_rank), default=0.0) for by_rank in reports)
    shared = {"engine": llm.engine, "mesh": llm.degrees.degrees, "timings": {"load": loading, **answers[0].timings}}
    return {**(each[0] if len(each) == 1 else {"answers": each}), **shared}
