"""``LLM``: a checkpoint's decoder on several ranks behind one object."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from multicard import collectives, partition
from multicard.config import ParallelConfig
from multicard.errors import ConfigError, UnsupportedError
from multicard.launch import Ranks
from multicard.mesh import ParallelMesh
from multicard.models import generate as decoding
from multicard.models.decoder import ParallelTransformer
from multicard.models.generate import Request
from multicard.models.load import check_folder, folder_path, load_decoder, parse_dtype
from multicard.models.sampling import Sampling
from multicard.models.tokenizer import Tokenizer
from multicard.weights import LoadReport

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or chat messages (``{"role": ..., "content": ...}``)."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
        text: the new tokens' text, special tokens left out; None without a tokenizer.
        token_ids: the new tokens, the one that ended it included.
        prompt_tokens: how many tokens the prompt had.
        timings: of the batch that it was part of, in seconds: "prefill" (to the first token), "decode" (the others),
            and "tokens_per_second" of decoding, for each prompt.
    """

    text: str | None
    token_ids: list[int]
    prompt_tokens: int
    timings: dict[str, float]


class LLM:
    """A checkpoint's decoder on several ranks; a context manager.

    Llama, Mistral, Qwen2 and Qwen3 run on our own decoder, others by ``transformers``; ``engine`` says which.

    Ranks are started, each reads its own part of the checkpoint, and they wait for requests until :meth:`close`. A
    request that is refused leaves them as they are; should a rank die, the next request starts them again. Inside a
    job (torchrun, ``multicard run``) the job's own ranks are used, and every rank makes every call.

    Args:
        path: a Hugging Face checkpoint folder with safetensors.
        tp: ranks that share every layer.
        ring, ulysses: ranks that share the sequence and its cache.
        dp: copies, which share a list of prompts.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16", "float16".
        verify: compare the files with SHA256SUMS in their folder first.
        progress: show a bar on standard error while loading; None: on a terminal.
        options: those of :class:`multicard.Ranks`: timeout, start_timeout, threads_per_rank, backend, device, check.

    Raises:
        ConfigError, UnsupportedError, CheckpointError: before a rank starts where the folder and the degrees tell;
            ConfigError where a shard doesn't fit in memory, naming the degree that would.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        tp: int = 1,
        ring: int = 1,
        ulysses: int = 1,
        dp: int = 1,
        dtype: str | torch.dtype = "auto",
        verify: bool = False,
        progress: bool | None = None,
        **options: Any,
    ) -> None:
        self.degrees = ParallelConfig(tp=tp, ring=ring, ulysses=ulysses, dp=dp)
        self.path = folder_path(path)
        loading = (str(self.path), parse_dtype(dtype), verify)
        self._progress = progress
        self.config, self.engine = _check_folder(self.path, self.degrees)
        self._loading = (self.engine, *loading)
        self.tokenizer = Tokenizer.from_folder(self.path)
        self._closed = False
        self._ranks = Ranks(self.degrees, **options)
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        ignore_eos: bool = False,
        raw: bool = False,
    ) -> Any:
        """Answer a prompt, or each of a list of them (of any lengths) as one batch.

        Args:
            prompts: text, token ids or chat messages; or a list of such.
            max_new_tokens: new tokens for each at most; the end of the model's context ends it too.
            temperature: 0 takes the likeliest token (the lowest id of equal ones).
            top_k, top_p, seed: see :class:`multicard.models.sampling.Sampling`. The same seed gives the same tokens at
                every degree.
            ignore_eos: go on after a token that ends an answer.
            raw: no chat template: go on from the text.

        Returns:
            a :class:`Generation`, or a list of them for a list.

        Raises:
            ConfigError: a value or a prompt that can't be meant, one longer than the model's context.
            UnsupportedError: more tokens than the checkpoint's sliding window.
        """
        many = _is_list(prompts)
        each: Sequence[Any] = prompts if many else [prompts]
        ids = [self._encode(prompt, raw) for prompt in each]
        request = self._request(ids, max_new_tokens, Sampling(temperature, top_k, top_p, seed), ignore_eos)
        tokens, timings = self._alive().run(_generate, self._model, request)[0]
        found = [
            Generation(self.tokenizer.decode(new) if self.tokenizer else None, new, len(prompt), timings)
            for prompt, new in zip(ids, tokens, strict=True)
        ]
        return found if many else found[0]

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        ignore_eos: bool = False,
        raw: bool = False,
    ) -> Iterator[str]:
        """The same answer as :meth:`generate`'s, in pieces of text as they come; dropping the iterator ends it.

        Raises:
            ConfigError: at once, before the first piece, as :meth:`generate`; and without a tokenizer.
        """
        if self.tokenizer is None:
            raise ConfigError(f"{self.path} has no tokenizer.json to stream text with: use generate")
        ids = self._encode(prompt, raw)
        request = self._request([ids], max_new_tokens, Sampling(temperature, top_k, top_p, seed), ignore_eos)
        return self.tokenizer.pieces(self._alive().stream(_stream, self._model, request))

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits after every token: ``(sequence, vocabulary)`` float32 on the CPU."""
        self._request([list(token_ids)], 1, Sampling(), True)
        return self._alive().run(_logits, self._model, list(token_ids))[0]

    def close(self) -> None:
        """End the ranks."""
        self._closed = True
        self._ranks.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encode(self, prompt: Prompt, raw: bool) -> list[int]:
        if not isinstance(prompt, str) and all(isinstance(part, int) for part in prompt):
            return list(prompt)  # type: ignore[arg-type]
        if self.tokenizer is None:
            raise ConfigError(f"{self.path} has no tokenizer.json: give the prompt as token ids")
        return self.tokenizer.encode(prompt, raw)  # type: ignore[arg-type]

    def _request(self, prompts: list[list[int]], new: int, sampling: Sampling, ignore_eos: bool) -> Request:
        request = Request(prompts, new, sampling, frozenset() if ignore_eos else frozenset(self.config.eos))
        request.check(self.config)
        return request

    def _alive(self) -> Ranks:
        if self._closed:
            raise ConfigError("this LLM is closed: make another")
        if not self._ranks.alive:
            self._ranks.restart()
            self._load()
        return self._ranks

    def _load(self) -> None:
        self._model = self._ranks.keep(_Slot.on)
        steps = self._ranks.stream(_load, self._model, *self._loading)
        with _bar(self._progress, f"loading {self.path.name} on {self.degrees}") as show:
            for share in steps:
                show(share)
        self.load_reports = [LoadReport(**report) for report in self._ranks.run(_report, self._model)]


class _Slot:
    """Where a rank keeps its model."""

    model: ParallelTransformer
    report: LoadReport

    @classmethod
    def on(cls, mesh: ParallelMesh) -> _Slot:
        return cls()


def _check_folder(path: pathlib.Path, degrees: ParallelConfig) -> tuple[Any, str]:
    """The decoder's config and whose decoder it is: ours or, for architectures that ours isn't, transformers'."""
    try:
        return check_folder(path, degrees), "multicard"
    except UnsupportedError as refusal:
        if importlib.util.find_spec("transformers") is None:
            raise
        from multicard.integrations import transformers_llm as fallback

        try:
            return fallback.check_folder(path, degrees), "transformers"
        except UnsupportedError as other:
            raise other from refusal


def _load(
    mesh: ParallelMesh, slot: _Slot, engine: str, path: str, dtype: torch.dtype | None, verify: bool
) -> Iterator[float]:
    load: Any = load_decoder
    if engine == "transformers":
        from multicard.integrations.transformers_llm import load_decoder as load
    for step in load(mesh, path, dtype, verify):
        if isinstance(step, float):
            yield step
        else:
            slot.model, slot.report = step


def _report(mesh: ParallelMesh, slot: _Slot) -> dict[str, Any]:
    return dataclasses.asdict(slot.report)


def _generate(mesh: ParallelMesh, slot: _Slot, request: Request) -> tuple[list[list[int]], dict[str, float]]:
    """Every prompt's new tokens, on every rank: each data-parallel copy answers its share of them."""
    mine = partition.split(len(request.prompts), mesh.dp.size)[mesh.dp.rank]
    part = dataclasses.replace(request, prompts=request.prompts[mine.start : mine.stop], first=mine.start)
    begin = time.perf_counter()
    first, steps, tokens = begin, 0, [[] for _ in mine]  # type: ignore[var-annotated]
    for step in decoding.generate(slot.model, part):
        steps += 1
        if steps == 1:
            first = time.perf_counter()
        for row, token in enumerate(step):
            if token is not None:
                tokens[row].append(token)
    decode = time.perf_counter() - first
    rate = (steps - 1) / decode if steps > 1 else 0.0
    timings = {"prefill": first - begin, "decode": decode, "tokens_per_second": rate}
    return _gather_tokens(tokens, mesh, len(request.prompts), request.max_new_tokens), timings


def _gather_tokens(tokens: list[list[int]], mesh: ParallelMesh, prompts: int, width: int) -> list[list[int]]:
    """Every copy's answers on every rank. One all-gather on ``dp``."""
    if mesh.dp.size == 1:
        return tokens
    table = torch.tensor([row + [-1] * (width - len(row)) for row in tokens], device=mesh.device, dtype=torch.int64)
    sizes = partition.split_sizes(prompts, mesh.dp.size)
    whole = collectives.all_gather(table.reshape(-1, width), mesh.dp, sizes=sizes)
    return [[token for token in row if token >= 0] for row in whole.tolist()]


def _stream(mesh: ParallelMesh, slot: _Slot, request: Request) -> Iterator[int]:
    for step in decoding.generate(
        slot.model, request
    ):  # on every data-parallel copy: the others have nothing else to do
        yield step[0]  # type: ignore[misc]


def _logits(mesh: ParallelMesh, slot: _Slot, token_ids: list[int]) -> torch.Tensor:
    return decoding.logits(slot.model, token_ids)


def _is_list(prompts: Any) -> bool:
    """Whether these are several prompts, and not one of text, token ids or messages."""
    return not isinstance(prompts, str) and not all(isinstance(part, int | Mapping) for part in prompts)


class _bar:  # noqa: N801  used as a function
    """A progress bar on standard error; nothing where it isn't a terminal."""

    def __init__(self, wanted: bool | None, label: str) -> None:
        self._shown = sys.stderr.isatty() if wanted is None else wanted
        self._label = label

    def __enter__(self) -> Any:
        if not self._shown:
            return lambda share: None
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True), transient=True)
        self._bar.start()
        task = self._bar.add_task(self._label, total=1.0)
        return lambda share: self._bar.update(task, completed=share)

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._bar.stop()
