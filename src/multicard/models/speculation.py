"""Speculative decoding: several tokens in a step, exactly those that plain decoding chooses."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from multicard.models.answer import Answer
from multicard.models.decoder import Cache
from multicard.models.drafts import Drafter
from multicard.models.sampling import finite
from multicard.models.step import Stepper


def speculate(stepper: Stepper, cache: Cache, answer: Answer, drafter: Drafter) -> Iterator[int]:
    """The rest of an answer, token by token.

    A step drafts tokens, runs the model on the last token and all drafts at once, and chooses after each of them what
    plain decoding would choose there (arXiv 2211.17192; noise is keyed by seed, prompt, step and token, so the choice
    is determined by the tokens before it, and a draft is accepted where it is equal). The answer is continued by the
    accepted drafts and the choice after them. All ranks decide from the same exchanged numbers.

    Args:
        cache: holds all of the answer's tokens but the last; drafts need no more room in it than the answer.
    """
    while answer.room:
        tokens = _step(stepper, cache, answer, drafter)
        for token in tokens[:-1]:
            answer.accepted += 1
            yield answer.add(token)
            if not answer.room:
                return
        yield answer.add(tokens[-1])


def _step(stepper: Stepper, cache: Cache, answer: Answer, drafter: Drafter) -> list[int]:
    """The accepted drafts and one more token. One read from the device."""
    with torch.inference_mode():
        drafts = drafter.draft(answer)
        last = torch.tensor(answer.tokens[-1:], device=drafts.device)
        ids = torch.cat([last, drafts.clamp(min=0)])  # NOT_FINITE has no embedding
        before, noise = cache.length, answer.noise(len(ids))
        chosen = stepper.choose(stepper.run(ids[None], cache, last_only=False)[0], noise)
        numbers: list[int] = torch.cat([drafts, chosen]).tolist()
    drafted, found = finite(numbers[: len(drafts)], "draft model"), numbers[len(drafts) :]
    agreed = [one == other for one, other in zip(drafted, found, strict=False)]
    accepted = [*agreed, False].index(False)
    answer.drafted += len(drafted)
    cache.crop(before + 1 + accepted)
    return finite(found[: accepted + 1])  # after a wrong draft they may be anything
