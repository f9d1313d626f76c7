"""What drafts the next tokens of an answer: a look at its own tokens, or a smaller model."""

from __future__ import annotations

import array
import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from multicard.models.answer import Answer
from multicard.models.compiled import Compilation
from multicard.models.decoder import ParallelTransformer
from multicard.models.sampling import Sampling
from multicard.models.step import Stepper

LONGEST, SHORTEST = 4, 2  # tokens of an ending that is looked for


class Drafter(Protocol):
    """Drafts for a single answer."""

    def draft(self, answer: Answer) -> Tensor:
        """Tokens that may come next, ``(tokens,)`` int64, the same on every rank, less than the answer has room for.

        ``answer`` is the same at every call. Nothing is read from the device.
        """


def lookup(tokens: Sequence[int], most: int) -> list[int]:
    """What followed the ending of ``tokens`` where it occurred before, at most so many; nothing if it didn't.

    The ending is as long as one that did, LONGEST to SHORTEST tokens, and the place the last one. What followed may
    overlap the ending, and then goes on with itself: a repetition is continued.
    """
    text = array.array("I", tokens)
    raw, size = text.tobytes(), text.itemsize
    for length in range(min(LONGEST, len(tokens) - 1), SHORTEST - 1, -1):
        found = _rfind(raw, raw[-length * size :], size)
        if found >= 0:
            source = found + length
            for place in range(source, source + most):
                text.append(text[place])
            return text[len(tokens) :].tolist()
    return []


def _rfind(raw: bytes, ending: bytes, size: int) -> int:
    """The last item of ``raw``, each of ``size`` bytes, at which ``ending`` occurs, other than at the end; or -1."""
    at = raw.rfind(ending, 0, len(raw) - size)
    while at > 0 and at % size:
        at = raw.rfind(ending, 0, at + len(ending) - 1)
    return at // size


class PromptLookup:
    """Drafts what followed the answer's last tokens earlier, in the prompt or in the answer (see :func:`lookup`)."""

    def __init__(self, most: int, device: torch.device) -> None:
        self._most, self._device = most, device

    def draft(self, answer: Answer) -> Tensor:
        found = lookup(answer.tokens, min(self._most, answer.room - 1))
        return torch.tensor(found, dtype=torch.int64, device=self._device)


class DraftModel:
    """Drafts what a smaller model would answer, with the same noise.

    Args:
        most: tokens at a time.
        stepper: of the model.
        capacity: the most tokens of a prompt and its answer. Past the model's own context nothing is drafted.

    Raises:
        ConfigError: its cache doesn't fit in this rank's memory.
    """

    def __init__(self, most: int, stepper: Stepper, capacity: int) -> None:
        config = stepper.model.config
        self._most, self._stepper = most, stepper
        self._limit = min(capacity, config.context, config.window or config.context)
        self._cache = stepper.model.new_cache(self._limit)

    def draft(self, answer: Answer) -> Tensor:
        cache, tokens, device = self._cache, answer.tokens, self._stepper.model.mesh.device
        noise = answer.noise(min(self._most, answer.room - 1, self._limit - len(tokens) + 1))
        if not noise:
            return torch.empty(0, dtype=torch.int64, device=device)
        cache.crop(min(cache.length, len(tokens) - 1))  # the others were drafted, and not accepted
        ids, found = torch.tensor([tokens[cache.length :]], device=device), []
        for each in noise:
            new = self._stepper.choose(self._stepper.run(ids, cache)[:, -1], [each])
            found.append(new)
            ids = new.clamp(min=0)[:, None]  # NOT_FINITE is an error once the drafts are read
        return torch.cat(found)


@dataclasses.dataclass(frozen=True)
class Drafting:
    """How answers are drafted.

    Args:
        most: so many tokens at a time.
        model: drafts them; None: they are looked up.
        compilation: of the model's step.
    """

    most: int
    model: ParallelTransformer | None = None
    compilation: Compilation | None = None

    def drafter(self, capacity: int, sampling: Sampling, device: torch.device) -> Drafter:
        """For one answer, which has at most ``capacity`` tokens with its prompt."""
        if self.model is None:
            return PromptLookup(self.most, device)
        return DraftModel(self.most, Stepper(self.model, self.compilation, sampling), capacity)
