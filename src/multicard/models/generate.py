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
from multicard.models.compiled import Compilation
from multicard.models.config import DecoderConfig
from multicard.models.decoder import Cache, ParallelTransformer
from multicard.models.kv_cache import KVCache
from multicard.models.packed_prompts import PackedPrompts
from multicard.models.sampling import Sampling, choose, read
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
    model: ParallelTransformer, request: Request, compilation: Compilation | None = None
) -> Iterator[list[int | None]]:
    """At each step, every prompt's new token, or None if its answer has ended.

    An answer ends at a stop id, at ``max_new_tokens``, or at the end of the model's context; the generator ends with
    the last answer. Every rank yields the same. Our caches drop an ended answer, which then costs nothing.
    """
    if not request.prompts:  # a data-parallel replica without work
        return
    prompts, axis = request.prompts, model.mesh.sequence
    room = [min(request.max_new_tokens, model.config.context - len(prompt) + 1) for prompt in prompts]
    rows, running, ids = list(range(len(prompts))), [True] * len(prompts), torch.empty(0)
    for step in range(max(room)):
        with torch.inference_mode():
            if step == 0:
                cache, logits = _prefill(model, prompts, max(room))
            else:
                # Compiling waits for the first token, and a batch is computed by the model itself.
                compiled = compilation.step() if compilation and len(rows) == 1 and not cache.padded else None
                logits = (compiled or model)(ids, cache)
            numbers = [request.first + row for row in rows]
            new = choose(logits[:, -1], model.mesh.tp, model.lm_head.vocabulary, request.sampling, numbers, step)
            new = collectives.broadcast(new, axis)  # each has chosen the same; the broadcast guarantees it
        tokens = {row: token for row, token in zip(rows, read(new), strict=True) if running[row]}
        yield [tokens.get(row) for row in range(len(prompts))]
        for row, token in tokens.items():
            running[row] = token not in request.stop and step + 1 < room[row]
        if not any(running):
            return
        going = [index for index, row in enumerate(rows) if running[row]]
        with torch.inference_mode():
            if len(going) < len(rows) and hasattr(cache, "select"):  # caches of transformers keep all rows
                cache, new, rows = cache.select(going), new[going], [rows[index] for index in going]
            ids = new[:, None]


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
    model: ParallelTransformer, mesh: ParallelMesh, request: Request, compilation: Compilation | None = None
) -> tuple[list[list[int]], dict[str, float]]:
    """Every prompt's new tokens, on every rank, and timings; each data-parallel replica answers some of the prompts."""
    mine = partition.split(len(request.prompts), mesh.dp.size)[mesh.dp.rank]
    part = dataclasses.replace(request, prompts=request.prompts[mine.start : mine.stop], first=mine.start)
    tokens: list[list[int]] = [[] for _ in mine]
    begin = time.perf_counter()
    first, steps = begin, 0
    for step in generate(model, part, compilation):
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
    """Every replica's answers on every rank. One all-gather on ``dp``."""
    if mesh.dp.size == 1:
        return tokens
    table = torch.tensor([row + [-1] * (width - len(row)) for row in tokens], device=mesh.device, dtype=torch.int64)
    sizes = partition.split_sizes(prompts, mesh.dp.size)
    whole = collectives.all_gather(table.reshape(-1, width), mesh.dp, sizes=sizes)
    return [[token for token in row if token >= 0] for row in whole.tolist()]


def logits(model: ParallelTransformer, ids: Sequence[int]) -> torch.Tensor:
    """Every position's logits of one sequence, ``(sequence, vocabulary)`` float32 on the CPU. One more all-gather."""
    gather = GatherLastDim(model.mesh.tp, model.config.vocab_size)
    with torch.inference_mode():
        local = model(torch.tensor([list(ids)], device=model.mesh.device), model.new_cache(len(ids)), last_only=False)
        return gather(local)[0].float().cpu()
