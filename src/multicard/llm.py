"""``LLM``: a checkpoint's decoder on several ranks behind one object."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from multicard.config import ParallelConfig
from multicard.errors import ConfigError, MulticardError, UnsupportedError
from multicard.launch import Ranks
from multicard.mesh import ParallelMesh
from multicard.models import generate as decoding
from multicard.models.decoder import ParallelTransformer
from multicard.models.generate import Request
from multicard.models.load import check_folder, load_decoder
from multicard.models.sampling import Sampling
from multicard.models.tokenizer import Tokenizer
from multicard.replica import Replica
from multicard.weights import LoadReport
from multicard.weights.folder import folder_path, parse_dtype

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
    request that is refused leaves them as they are. Should a rank die, the request under way or else the next one
    raises :class:`~multicard.errors.RankError`, and the one after that starts them again. Inside a job (torchrun,
    ``multicard run``) the job's own ranks are used, and every rank makes every call.

    Args:
        path: a Hugging Face checkpoint folder with safetensors.
        tp: ranks that share every layer.
        ring, ulysses: ranks that share the sequence and its cache.
        dp: replicas, which share a list of prompts.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16", "float16".
        verify: compare the files with SHA256SUMS in their folder first.
        progress: show a bar on standard error while loading; None: on a terminal.
        options: those of :class:`multicard.Ranks`: timeout, start_timeout, threads_per_rank, backend, device, check,
            compare_inputs.

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
            ConfigError: an invalid value or prompt, or a prompt longer than the model's context.
            UnsupportedError: more tokens than the checkpoint's sliding window.
        """
        prompts = _plain(prompts)
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
        ids = self._encode(_plain(prompt), raw)
        request = self._request([ids], max_new_tokens, Sampling(temperature, top_k, top_p, seed), ignore_eos)
        return self.tokenizer.pieces(self._alive().stream(_stream, self._model, request))

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits after every token: ``(sequence, vocabulary)`` float32 on the CPU."""
        ids = _plain(token_ids)
        if not _is_ids(ids):
            raise ConfigError(f"token_ids={token_ids!r}: logits takes a list of token ids")
        self._request([ids], 1, Sampling(), True)
        return self._alive().run(_logits, self._model, ids)[0]

    def restart(self) -> None:
        """End the ranks, start new ones, and load again."""
        self._ranks.restart()
        try:
            self._load()
        except BaseException:
            self._ranks.close()
            raise

    def close(self) -> None:
        """End the ranks."""
        self._closed = True
        self._ranks.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encode(self, prompt: Any, raw: bool) -> list[int]:
        if _is_ids(prompt):
            return list(prompt)
        if not isinstance(prompt, str) and not _is_chat(prompt):
            raise ConfigError(f"{prompt!r} is no prompt: text, a list of token ids, or chat messages")
        if self.tokenizer is None:
            raise ConfigError(f"{self.path} has no tokenizer.json: give the prompt as token ids")
        return self.tokenizer.encode(prompt, raw)

    def _request(self, prompts: list[list[int]], new: int, sampling: Sampling, ignore_eos: bool) -> Request:
        request = Request(prompts, new, sampling, frozenset() if ignore_eos else frozenset(self.config.eos))
        request.check(self.config)
        return request

    def _alive(self) -> Ranks:
        if self._closed:
            raise ConfigError("this LLM is closed: make another")
        if not self._ranks.alive and self._ranks.told:  # where nobody knows of it yet, the request raises
            self.restart()
        return self._ranks

    def _load(self) -> None:
        self._model = self._ranks.keep(_Slot)
        steps = self._ranks.stream(_load, self._model, *self._loading)
        with _bar(self._progress, f"loading {self.path.name} on {self.degrees}") as show:
            for share in steps:
                show(share)
        self.load_reports = [LoadReport(**report) for report in self._ranks.run(_report, self._model)]


class _Slot:
    """Where a rank keeps its model. All ranks are given the same requests, those of dp too."""

    model: ParallelTransformer
    report: LoadReport

    def __init__(self, mesh: ParallelMesh) -> None:
        self.replicas = Replica(mesh, whole_mesh=True)


def _check_folder(path: pathlib.Path, degrees: ParallelConfig) -> tuple[Any, str]:
    """The decoder's config and whose decoder it is: ours or, for architectures that ours isn't, transformers'."""
    try:
        return check_folder(path, degrees), "multicard"
    except UnsupportedError as refusal:
        if importlib.util.find_spec("transformers") is None:
            raise
        try:
            return _check_with_transformers(path, degrees), "transformers"
        except MulticardError as other:
            raise other from refusal
        except Exception as other:  # what transformers says of a config that it can't make a model of
            said = f"{type(other).__name__} {other}".splitlines()[0]
            raise UnsupportedError(f"{refusal}; transformers makes no model of it: {said}") from other


def _check_with_transformers(path: pathlib.Path, degrees: ParallelConfig) -> Any:
    """Its warnings are held back: where it fails, the error says why."""
    from transformers.utils import logging

    from multicard.integrations.transformers.llm import check_folder as check_transformers

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        return check_transformers(path, degrees)
    finally:
        logging.set_verbosity(verbosity)


def _load(
    mesh: ParallelMesh, slot: _Slot, engine: str, path: str, dtype: torch.dtype | None, verify: bool
) -> Iterator[float]:
    slot.replicas.compare("loading an LLM", {"engine": engine, "dtype": dtype, "verify": verify})
    load: Any = load_decoder
    if engine == "transformers":
        from multicard.integrations.transformers.llm import load_decoder as load
    for step in load(mesh, path, dtype, verify):
        if isinstance(step, float):
            yield step
        else:
            slot.model, slot.report = step


def _report(mesh: ParallelMesh, slot: _Slot) -> dict[str, Any]:
    return dataclasses.asdict(slot.report)


def _generate(mesh: ParallelMesh, slot: _Slot, request: Request) -> tuple[list[list[int]], dict[str, float]]:
    slot.replicas.compare("LLM.generate", vars(request))
    return decoding.answer(slot.model, mesh, request)


def _stream(mesh: ParallelMesh, slot: _Slot, request: Request) -> Iterator[int]:
    # Every data-parallel replica computes it: the others have nothing else to do.
    slot.replicas.compare("LLM.stream", vars(request))
    for step in decoding.generate(slot.model, request):
        yield step[0]  # type: ignore[misc]


def _logits(mesh: ParallelMesh, slot: _Slot, token_ids: list[int]) -> torch.Tensor:
    slot.replicas.compare("LLM.logits", {"token_ids": token_ids})
    return decoding.logits(slot.model, token_ids)


def _plain(prompts: Any) -> Any:
    """Tensors and arrays of token ids as lists of Python's ints."""
    if hasattr(prompts, "tolist"):
        return prompts.tolist()
    return [_plain(part) for part in prompts] if isinstance(prompts, list | tuple) else prompts


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(type(part) is int for part in prompt)


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(isinstance(part, Mapping) for part in prompt)


def _is_list(prompts: Any) -> bool:
    """Whether these are several prompts, and not one of text, token ids or messages."""
    return isinstance(prompts, list) and not _is_ids(prompts) and not _is_chat(prompts)


@contextlib.contextmanager
def _bar(wanted: bool | None, label: str) -> Iterator[Callable[[float], None]]:
    """A progress bar on standard error, moved by calling what this gives; nothing where that isn't a terminal."""
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield lambda share: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=1.0)
        yield lambda share: progress.update(task, completed=share)
