"""``LLM``: a checkpoint's decoder on several ranks behind one object."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Unpack

import torch

from multicard import engines
from multicard.config import ParallelConfig
from multicard.engines import Loaded
from multicard.errors import ConfigError
from multicard.mesh import ParallelMesh
from multicard.models import generate as decoding
from multicard.models.generate import Request
from multicard.models.sampling import Sampling
from multicard.models.tokenizer import Tokenizer
from multicard.progress import loading_bar
from multicard.ranks.settings import Options
from multicard.session import Session
from multicard.weights import LoadReport, checkpoint_path
from multicard.weights.folder import parse_dtype, paths_of

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or chat messages (``{"role": ..., "content": ...}``)."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
        text: the new tokens' text, without special tokens; None without a tokenizer.
        token_ids: the new tokens, including the end token.
        prompt_tokens: how many tokens the prompt had.
        timings: of the whole batch, in seconds: "prefill" (to the first token) and "decode" (the others), and
            "tokens_per_second" of decoding, for each prompt.
        drafted, accepted: how many tokens were drafted for this answer, and how many of those it has.
    """

    text: str | None
    token_ids: list[int]
    prompt_tokens: int
    timings: dict[str, float]
    drafted: int = 0
    accepted: int = 0


class LLM(Session):
    """A checkpoint's decoder on several ranks; a context manager.

    Llama, Mistral, Qwen2 and Qwen3 run on our own decoder, others through ``transformers``; ``engine`` says which.

    Each rank reads its own part of the checkpoint. Requests, failures, restarts and jobs: see
    :class:`~multicard.session.Session`.

    Args:
        path: a Hugging Face checkpoint folder with safetensors, or a GGUF file (of several, the first).
        tp: ranks that share every layer.
        ring, ulysses: ranks that share the sequence and its cache.
        dp: replicas, over which a list of prompts is divided.
        dtype: "auto" (the checkpoint's; a GGUF file's is bfloat16 unless all is float32), "float32", "bfloat16",
            "float16".
        compile: decode steps of up to 8 tokens on CPUs; our own decoder's only. "auto": beside the first answers, if
            there is a C++ compiler and unless MULTICARD_COMPILE=0, for this and later runs; True: before the first
            answer; False: not at all.
        draft: how tokens are drafted, for single prompts; answers stay the same, but for bfloat16's rounding. "prompt":
            what followed the last tokens earlier in the prompt or the answer; a path: what a smaller checkpoint with
            the same vocabulary answers, split over the same ranks. Our own decoder's only.
        draft_tokens: at most so many in a step.
        lora: the folder of a LoRA adapter of peft's, or of several, which are added to the weights as they are read.
            Our own decoder's only.
        quantize: round a folder's weights as they are read, in blocks of 32 with a scale: "int8" (8.5 bits a weight) or
            "int4" (5 bits; embedding and head 8.5). Our own decoder's only.
        verify: compare the files with SHA256SUMS in their folder first.
        progress: show a bar on standard error while loading; None: only on a terminal.
        options: how ranks are started, as for :func:`multicard.launch`.

    Raises:
        ConfigError, UnsupportedError, CheckpointError: before a rank starts, if the folder and the degrees show it;
            ConfigError if a shard doesn't fit in memory, naming a degree at which it would, or if compile=True isn't
            possible here.
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
        compile: bool | str = "auto",
        draft: str | os.PathLike[str] | None = None,
        draft_tokens: int = 7,
        lora: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
        quantize: str | None = None,
        verify: bool = False,
        progress: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        degrees = ParallelConfig(tp=tp, ring=ring, ulysses=ulysses, dp=dp)
        self.path = checkpoint_path(path)
        self.draft, self.lora = engines.parse_draft(draft), paths_of("lora", lora)
        loading = engines.Loading(parse_dtype(dtype), verify, compile, self.draft, draft_tokens, self.lora, quantize)
        self.config, self.engine = engines.check(self.path, degrees, loading)
        self.tokenizer = Tokenizer.of(self.path)
        self._before_loading()
        bar = functools.partial(loading_bar, progress, f"loading {self.path.name} on {degrees}")
        super().__init__(degrees, options, engines.load, self.engine, str(self.path), loading, bar=bar)

    def _before_loading(self) -> None:
        """For a subclass that has its prompts by now: what is wrong with them needn't wait for the weights."""

    def _after_loading(self) -> None:
        by_rank = [[LoadReport(**report) for report in reports] for reports in self._run(_reports)]
        self.load_reports = [reports[0] for reports in by_rank]
        self.draft_load_reports = [reports[1] for reports in by_rank if len(reports) > 1]

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
            prompts: text, token ids or chat messages; or a list of these.
            max_new_tokens: at most so many new tokens for each; an answer also ends at the end of the model's context.
            temperature: 0 takes the likeliest token (of equally likely ones the lowest id).
            top_k, top_p, seed: see :class:`multicard.models.sampling.Sampling`. The same seed gives the same tokens at
                every degree.
            ignore_eos: continue after an end token.
            raw: use no chat template: continue the text itself.

        Returns:
            a :class:`Generation`, or a list of them for a list.

        Raises:
            ConfigError: an invalid value or prompt, or a prompt longer than the model's context.
            UnsupportedError: more tokens than the checkpoint's sliding window.
        """
        prompts = _plain(prompts)
        many = _is_list(prompts)
        sampling = Sampling(temperature, top_k, top_p, seed)
        request = self._request(prompts if many else [prompts], max_new_tokens, sampling, ignore_eos, raw)
        outcomes, timings = self._run(_generate, request)[0]
        found = [
            Generation(self.tokenizer.decode(new) if self.tokenizer else None, new, len(prompt), timings, *drafts)
            for prompt, (new, *drafts) in zip(request.prompts, outcomes, strict=True)
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
        """The same answer as from :meth:`generate`, in pieces of text as they are generated; drop the iterator to stop.

        Raises:
            ConfigError: at the call, before the first piece, as for :meth:`generate`; also without a tokenizer.
        """
        if self.tokenizer is None:
            raise ConfigError(f"{self.path} has no tokenizer to stream text with: use generate")
        sampling = Sampling(temperature, top_k, top_p, seed)
        request = self._request([_plain(prompt)], max_new_tokens, sampling, ignore_eos, raw)
        return self.tokenizer.pieces(self._stream(_stream, request))

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits after every token: ``(sequence, vocabulary)`` float32 on the CPU."""
        ids = _plain(token_ids)
        if not _is_ids(ids):
            raise ConfigError(f"token_ids={token_ids!r}: logits takes a list of token ids")
        self._request([ids], 1, Sampling(), ignore_eos=True)
        return self._run(_logits, ids)[0]

    def _encode(self, prompt: Any, raw: bool) -> list[int]:
        if _is_ids(prompt):
            return list(prompt)
        if not isinstance(prompt, str) and not _is_chat(prompt):
            raise ConfigError(f"{prompt!r} is not a prompt: give text, a list of token ids, or chat messages")
        if self.tokenizer is None:
            raise ConfigError(f"{self.path} has no tokenizer: give the prompt as token ids")
        return self.tokenizer.encode(prompt, raw)

    def _request(
        self, prompts: Sequence[Any], new: int, sampling: Sampling, ignore_eos: bool = False, raw: bool = False
    ) -> Request:
        ids = [self._encode(prompt, raw) for prompt in prompts]
        request = Request(ids, new, sampling, frozenset() if ignore_eos else frozenset(self.config.eos))
        request.check(self.config)
        return request


def _reports(mesh: ParallelMesh, loaded: Loaded) -> list[dict[str, Any]]:
    return [dataclasses.asdict(report) for report in loaded.reports]


def _generate(mesh: ParallelMesh, loaded: Loaded, request: Request) -> tuple[list[Any], dict[str, float]]:
    loaded.replicas.compare("LLM.generate", vars(request))
    outcomes, timings = decoding.answer(loaded.model, mesh, request, loaded.compilation, loaded.drafting)
    return [tuple(outcome) for outcome in outcomes], timings  # a job's ranks exchange plain types only


def _stream(mesh: ParallelMesh, loaded: Loaded, request: Request) -> Iterator[int]:
    # Every data-parallel replica computes the stream: the others have nothing else to do.
    loaded.replicas.compare("LLM.stream", vars(request))
    for step in decoding.generate(loaded.model, request, loaded.compilation, loaded.drafting):
        yield step[0]  # type: ignore[misc]


def _logits(mesh: ParallelMesh, loaded: Loaded, token_ids: list[int]) -> torch.Tensor:
    loaded.replicas.compare("LLM.logits", {"token_ids": token_ids})
    return decoding.logits(loaded.model, token_ids)


def _plain(prompts: Any) -> Any:
    """Tensors and arrays of token ids as lists of Python ints."""
    if hasattr(prompts, "tolist"):
        return prompts.tolist()
    return [_plain(part) for part in prompts] if isinstance(prompts, list | tuple) else prompts


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(type(part) is int for part in prompt)


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(isinstance(part, Mapping) for part in prompt)


def _is_list(prompts: Any) -> bool:
    """Whether these are several prompts, rather than a single one of text, token ids or messages."""
    return isinstance(prompts, list) and not _is_ids(prompts) and not _is_chat(prompts)
