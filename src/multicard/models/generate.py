"""Generating tokens for a batch of prompts, the same on every rank of a mesh."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence

import torch

from multicard import collectives, partition
from multicard.errors import ConfigError, UnsupportedError
from multicard.layers.head import GatherLastDim
from multicard.mesh import ParallelMesh
from multicard.models.answer import Answer, Outcome
from multicard.models.compiled import Compilation
from multicard.models.config import DecoderConfig
from multicard.models.decoder import Cache, ParallelTransformer
from multicard.models.drafts import Drafting
from multicard.models.kv_cache import KVCache
from multicard.models.packed_prompts import PackedPrompts
from multicard.models.sampling import Sampling, read
from multicard.models.speculation import speculate
from multicard.models.step import Stepper
from multicard.values import is_whole


@dataclasses.dataclass(frozen=True)
class Request:
    """Prompts to continue.

    Args:
        prompts: token ids of each.
        max_new_tokens: at most so many new tokens for each.
        sampling: how they are chosen.
        stop: ids that end an answer; they are part of it.
        first: the first prompt's number among the caller's prompts, which determines its noise.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop: frozenset[int] = frozenset()
    first: int = 0

    def answers(self, config: DecoderConfig) -> list[Answer]:
        """For every prompt the answer that it gets, still empty."""
        return [
            Answer(number, list(prompt), min(self.max_new_tokens, config.context - len(prompt) + 1), self.stop)
            for number, prompt in enumerate(self.prompts, start=self.first)
        ]

    def check(self, config: DecoderConfig) -> None:
        """Refuse an invalid request before anything runs.

        Raises:
            ConfigError: an empty prompt, a token that isn't in the vocabulary, a prompt longer than the context.
            UnsupportedError: more tokens than the checkpoint's sliding window.
        """
        if not is_whole(self.max_new_tokens, least=1):
            raise ConfigError(f"max_new_tokens={self.max_new_tokens!r}: a whole number of 1 or more")
        for number, prompt in enumerate(self.prompts, start=self.first):
            if not prompt:
                raise ConfigError(f"prompt {number} is empty: it needs at least one token")
            wrong = next((t for t in prompt if not 0 <= t < config.vocab_size), None)
            if wrong is not None:
                raise ConfigError(f"token id {wrong} is not in the vocabulary: ids are 0 to {config.vocab_size - 1}")
            if len(prompt) > config.context:
                raise ConfigError(f"prompt {number} has {len(prompt)} tokens, and the model's context {config.context}")
            total = min(len(prompt) + self.max_new_tokens, config.context)
            if config.window is not None and total > config.window:
                raise UnsupportedError(
                    f"prompt {number} and its answer take up to {total} tokens, past the sliding window of "
                    f"{config.window}, which the decoder lacks: at most {config.window} tokens in all"
                )


def generate(
    model: ParallelTransformer,
    request: Request,
    compilation: Compilation | None = None,
    drafting: Drafting | None = None,
) -> Iterator[list[int | None]]:
    """At each step, every prompt's new token, or None if its answer has ended.

    An answer ends at a stop id, at ``max_new_tokens``, or at the end of the model's context; the generator ends with
    the last answer. Every rank yields the same. Our caches drop an ended answer, which then costs nothing; once a
    single answer is left, its tokens may be drafted.
    """
    return _steps(model, request, request.answers(model.config), compilation, drafting)


def _steps(
    model: ParallelTransformer,
    request: Request,
    answers: Sequence[Answer],
    compilation: Compilation | None,
    drafting: Drafting | None,
) -> Iterator[list[int | None]]:
    """As :func:`generate`; the answers grow."""
    if not answers:  # a data-parallel replica without work
        return
    stepper, rows, ids = Stepper(model, compilation, request.sampling), list(answers), torch.empty(0)
    longest = max(len(answer.tokens) + answer.room for answer in answers)
    with torch.inference_mode():
        drafter = drafting.drafter(longest, request.sampling, model.mesh.device) if drafting else None
    for step in itertools.count():
        with torch.inference_mode():
            if step == 0:
                cache, logits = _prefill(model, request.prompts, max(answer.room for answer in answers))
            else:
                logits = stepper.run(ids, cache)
            new = stepper.choose(logits[:, -1], [(answer.number, step) for answer in rows])
        for answer, token in zip(rows, read(new), strict=True):
            if answer.room:
                answer.add(token)
        yield [answer.tokens[-1] if answer.new > step else None for answer in answers]
        going = [row for row, answer in enumerate(rows) if answer.room]
        if not going:
            return
        with torch.inference_mode():
            if len(going) < len(rows) and hasattr(cache, "select"):  # caches of transformers keep all rows
                cache, new, rows = cache.select(going), new[going], [rows[row] for row in going]
            ids = new[:, None]
        if drafter is not None and len(rows) == 1:
            for token in speculate(stepper, cache, rows[0], drafter):
                yield [token if answer is rows[0] else None for answer in answers]
            return


def _prefill(model: ParallelTransformer, prompts: Sequence[Sequence[int]], room: int) -> tuple[Cache, torch.Tensor]:
    """A cache that holds the prompts and has ``room`` for answers, and the logits after each prompt.

    Our cache takes them side by side in one row; others take them padded in front.
    """
    device, lengths = model.mesh.device, [len(prompt) for prompt in prompts]
    longest = max(lengths)
    starts = tuple(longest - length for length in lengths)
    cache = model.new_cache(longest + room - 1, starts)
    if isinstance(cache, KVCache) and len(prompts) > 1:
        ids = torch.tensor([list(itertools.chain.from_iterable(prompts))], device=device)
        return cache, model(ids, PackedPrompts(cache, lengths))
    padded = [[0] * pad + list(prompt) for pad, prompt in zip(starts, prompts, strict=True)]
    return cache, model(torch.tensor(padded, device=device), cache)


def answer(
    model: ParallelTransformer,
    mesh: ParallelMesh,
    request: Request,
    compilation: Compilation | None = None,
    drafting: Drafting | None = None,
) -> tuple[list[Outcome], dict[str, float]]:
    """What every prompt was answered, on every rank, and timings; each data-parallel replica answers some prompts."""
    mine = partition.split(len(request.prompts), mesh.dp.size)[mesh.dp.rank]
    part = dataclasses.replace(request, prompts=request.prompts[mine.start : mine.stop], first=mine.start)
    answers = part.answers(model.config)
    begin = time.perf_counter()
    first, steps = begin, 0
    for _ in _steps(model, part, answers, compilation, drafting):
        steps += 1
        if steps == 1:
            first = time.perf_counter()
    decode = time.perf_counter() - first
    rate = (steps - 1) / decode if steps > 1 else 0.0
    timings = {"prefill": first - begin, "decode": decode, "tokens_per_second": rate}
    outcomes = [each.outcome for each in answers]
    return _gather(outcomes, mesh, len(request.prompts), request.max_new_tokens), timings


def _gather(outcomes: list[Outcome], mesh: ParallelMesh, prompts: int, width: int) -> list[Outcome]:
    """Every replica's outcomes on every rank. One all-gather on ``dp``."""
    if mesh.dp.size == 1:
        return outcomes
    rows = [[o.drafted, o.accepted, *o.tokens, *[-1] * (width - len(o.tokens))] for o in outcomes]
    table = torch.tensor(rows, device=mesh.device, dtype=torch.int64).reshape(-1, 2 + width)
    sizes = partition.split_sizes(prompts, mesh.dp.size)
    whole = collectives.all_gather(table, mesh.dp, sizes=sizes).tolist()
    return [Outcome([token for token in row if token >= 0], drafted, accepted) for drafted, accepted, *row in whole]


def logits(model: ParallelTransformer, ids: Sequence[int]) -> torch.Tensor:
    """Every position's logits of one sequence, ``(sequence, vocabulary)`` float32 on the CPU. One more all-gather."""
    gather = GatherLastDim(model.mesh.tp, model.config.vocab_size)
    with torch.inference_mode():
        local = model(torch.tensor([list(ids)], device=model.mesh.device), model.new_cache(len(ids)), last_only=False)
        return gather(local)[0].float().cpu()
