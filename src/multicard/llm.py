"""``LLM``: a checkpoint's decoder on several ranks behind one object."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Unpack

import torch

from multicard import place
from multicard.config import ParallelConfig
from multicard.errors import CheckpointError, ConfigError, MulticardError, UnsupportedError
from multicard.extras import command, has
from multicard.mesh import ParallelMesh
from multicard.models import generate as decoding
from multicard.models.answer import Outcome
from multicard.models.compiled import Compilation, why_not
from multicard.models.drafts import Drafting
from multicard.models.generate import Request
from multicard.models.load import check_draft, check_folder, load_decoder, naming_draft
from multicard.models.sampling import Sampling
from multicard.models.tokenizer import Tokenizer
from multicard.progress import loading_bar
from multicard.ranks.settings import Options
from multicard.replica import Replica
from multicard.session import Session
from multicard.values import is_whole
from multicard.weights import LoadReport
from multicard.weights.folder import folder_path, parse_dtype

LOG = logging.getLogger(__name__)

MOST_DRAFTS = 64  # the logits of so many tokens are held at once

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
        path: a Hugging Face checkpoint folder with safetensors.
        tp: ranks that share every layer.
        ring, ulysses: ranks that share the sequence and its cache.
        dp: replicas, over which a list of prompts is divided.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16", "float16".
        compile: the decode step of single prompts on CPUs; our own decoder's only. "auto": beside the first answers, if
            there is a C++ compiler and unless MULTICARD_COMPILE=0, for this and later runs; True: before the first
            answer; False: not at all.
        draft: how tokens are drafted, for single prompts; the answers stay the same. "prompt": what followed the last
            tokens earlier in the prompt or the answer; a folder: what a smaller checkpoint with the same vocabulary
            answers, split over the same ranks. Our own decoder's only.
        draft_tokens: at most so many in a step.
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
        draft_tokens: int = 5,
        verify: bool = False,
        progress: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        degrees = ParallelConfig(tp=tp, ring=ring, ulysses=ulysses, dp=dp)
        self.path = folder_path(path)
        _check_compile(compile)
        self.draft = _check_draft(draft, draft_tokens)
        self.config, self.engine = _check_folder(self.path, degrees)
        if compile is True and self.engine != "multicard":
            raise UnsupportedError(f"compile=True: {self.engine} runs this model; only our own decoder is compiled")
        if draft is not None and self.engine != "multicard":
            raise UnsupportedError(f"draft={draft!r}: {self.engine} runs this model; only our own decoder takes drafts")
        if isinstance(self.draft, pathlib.Path):
            check_draft(self.draft, degrees, self.config)
        loading = (str(self.path), parse_dtype(dtype), verify, compile, self.draft and str(self.draft), draft_tokens)
        self.tokenizer = Tokenizer.from_folder(self.path)
        self._before_loading()
        bar = functools.partial(loading_bar, progress, f"loading {self.path.name} on {degrees}")
        super().__init__(degrees, options, _load, self.engine, *loading, bar=bar)

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
            raise ConfigError(f"{self.path} has no tokenizer.json to stream text with: use generate")
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
            raise ConfigError(f"{self.path} has no tokenizer.json: give the prompt as token ids")
        return self.tokenizer.encode(prompt, raw)

    def _request(
        self, prompts: Sequence[Any], new: int, sampling: Sampling, ignore_eos: bool = False, raw: bool = False
    ) -> Request:
        ids = [self._encode(prompt, raw) for prompt in prompts]
        request = Request(ids, new, sampling, frozenset() if ignore_eos else frozenset(self.config.eos))
        request.check(self.config)
        return request


@dataclasses.dataclass
class _Loaded:
    """What a rank keeps. All ranks are given the same requests, also those of different replicas."""

    model: Any
    reports: list[LoadReport]
    replicas: Replica
    compilation: Compilation | None = None
    drafting: Drafting | None = None


def _check_folder(path: pathlib.Path, degrees: ParallelConfig) -> tuple[Any, str]:
    """The decoder's config, and which library runs it: transformers runs architectures that our decoder lacks."""
    try:
        return check_folder(path, degrees), "multicard"
    except UnsupportedError as refusal:
        if not has("transformers"):
            raise UnsupportedError(f"{refusal}; or {command('transformers')}: LLM uses it for other models") from None
        try:
            return _check_with_transformers(path, degrees), "transformers"
        except CheckpointError as other:
            raise CheckpointError(f"{refusal}; {other}") from None
        except MulticardError as other:
            raise other from refusal


def _check_with_transformers(path: pathlib.Path, degrees: ParallelConfig) -> Any:
    """The config of a model that transformers runs. Its warnings are hidden: if it fails, the error says why."""
    from transformers.utils import logging

    from multicard.integrations.transformers.llm import check_folder as check_transformers

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        return check_transformers(path, degrees)
    finally:
        logging.set_verbosity(verbosity)


def _load(
    mesh: ParallelMesh,
    engine: str,
    path: str,
    dtype: torch.dtype | None,
    verify: bool,
    compile: bool | str,
    draft: str | None,
    draft_tokens: int,
) -> Generator[float, None, _Loaded]:
    replicas = Replica(mesh, whole_mesh=True)
    asked = {"engine": engine, "dtype": dtype, "verify": verify, "compile": compile}
    replicas.compare("loading an LLM", {**asked, "draft": draft, "draft_tokens": draft_tokens})
    if engine == "transformers":
        from multicard.integrations.transformers.llm import load_decoder as load_with_transformers

        model, report = yield from _last(load_with_transformers(mesh, path, dtype, verify))
        return _Loaded(model, [report], replicas)
    compiles = _compiles(mesh, compile)

    def ours(folder: str, begin: float, end: float) -> Generator[float, None, tuple[Any, LoadReport, Any]]:
        steps = load_decoder(mesh, folder, dtype, verify, reorder=not compiles)
        model, report = yield from _last(steps, begin, end)
        return model, report, Compilation(model, folder, wait=compile is True) if compiles else None

    if draft is None or draft == "prompt":
        model, report, compilation = yield from ours(path, 0.0, 1.0)
        return _Loaded(model, [report], replicas, compilation, None if draft is None else Drafting(draft_tokens))
    model, report, compilation = yield from ours(path, 0.0, 0.5)
    with naming_draft(draft):
        other, draft_report, of_draft = yield from ours(draft, 0.5, 1.0)
    drafting = Drafting(draft_tokens, other, of_draft)
    return _Loaded(model, [report, draft_report], replicas, compilation, drafting)


def _last(steps: Iterator[Any], begin: float = 0.0, end: float = 1.0) -> Generator[float, None, Any]:
    """A loader's model and report, which it yields last; the fractions before them go from ``begin`` to ``end``."""
    found = None
    for step in steps:
        if isinstance(step, float):
            yield begin + (end - begin) * step
        else:
            found = step
    return found


def _check_draft(draft: Any, tokens: int) -> pathlib.Path | str | None:
    """``draft``, a folder as an absolute path."""
    if not is_whole(tokens, least=1, most=MOST_DRAFTS):
        raise ConfigError(f"draft_tokens={tokens!r}: a whole number from 1 to {MOST_DRAFTS}")
    if draft is None or draft == "prompt":
        return draft
    if not isinstance(draft, str | os.PathLike):
        raise ConfigError(f"draft={draft!r}: must be None, 'prompt' or a checkpoint's folder")
    return folder_path(draft)


def _check_compile(compile: object) -> None:
    if not isinstance(compile, bool) and compile != "auto":
        raise ConfigError(f"compile={compile!r}: must be True, False or 'auto'")


def _compiles(mesh: ParallelMesh, compile: bool | str) -> bool:
    """Whether this rank compiles; where it can't, ``compile=True`` raises, and "auto" says so on the first rank."""
    if compile is False or (compile == "auto" and not place.compiling()):
        return False
    obstacle = why_not(mesh.device)
    if obstacle and compile is True:
        raise ConfigError(f"compile=True: {obstacle}")
    if obstacle and mesh.rank == 0:
        LOG.warning("decoding stays uncompiled, which gives the same tokens but slower: %s", obstacle)
    return obstacle is None


def _reports(mesh: ParallelMesh, loaded: _Loaded) -> list[dict[str, Any]]:
    return [dataclasses.asdict(report) for report in loaded.reports]


def _generate(mesh: ParallelMesh, loaded: _Loaded, request: Request) -> tuple[list[Outcome], dict[str, float]]:
    loaded.replicas.compare("LLM.generate", vars(request))
    return decoding.answer(loaded.model, mesh, request, loaded.compilation, loaded.drafting)


def _stream(mesh: ParallelMesh, loaded: _Loaded, request: Request) -> Iterator[int]:
    # Every data-parallel replica computes the stream: the others have nothing else to do.
    loaded.replicas.compare("LLM.stream", vars(request))
    for step in decoding.generate(loaded.model, request, loaded.compilation, loaded.drafting):
        yield step[0]  # type: ignore[misc]


def _logits(mesh: ParallelMesh, loaded: _Loaded, token_ids: list[int]) -> torch.Tensor:
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
