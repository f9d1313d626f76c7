# ruff: noqa: SIM905  lists of names are easier to read and to compare as words
"""One request of a diffusers pipeline shared out over data-parallel replicas, each image the same as in one batch."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from multicard import partition
from multicard.errors import UnsupportedError

LEADS = ("prompt", "class_labels", "prompt_embeds", "image", "video", "image_embeds")
"""Arguments that determine the number of prompts; the first that is given counts."""

PER_PROMPT = re.compile(r"prompt|class_labels|^(mask_|control_|negative_)?image(_embeds)?$|^video$|^latents$")
"""Names of arguments with one item, or one row of a tensor, for each prompt."""

FOR_ALL = frozenset(["timesteps", "sigmas"])
"""Lists that have no item for each prompt, whatever their length."""

RANDOM = frozenset(
    "normal normal_ uniform_ bernoulli bernoulli_ multinomial randint randint_like randperm exponential_ poisson "
    "log_normal_ cauchy_ geometric_ random_".split()
)
"""Functions whose numbers would depend on how prompts are shared out."""


class Batch:
    """The prompts of one request, and which data-parallel replica answers which.

    A list of several prompts is split evenly in order, with one more for the first replicas; a single prompt goes to
    the first.

    Args:
        arguments: of the pipeline's call, by name.
        replicas: how many there are.
    """

    def __init__(self, arguments: Mapping[str, Any], replicas: int) -> None:
        self._arguments = arguments
        self.prompts = next((n for name in LEADS if (n := _rows(arguments.get(name))) is not None), 1)
        self.shares = partition.split(self.prompts, replicas)
        repeats = [value for name, value in arguments.items() if re.fullmatch(r"num_\w+_per_prompt", name)]
        self.repeats = int(repeats[0]) if repeats and repeats[0] else 1
        self.shared = replicas > 1 and self.prompts > 1

    def arguments(self, replica: int) -> dict[str, Any] | None:
        """The arguments of ``replica``'s call; None if it has no prompt.

        Raises:
            UnsupportedError: a list or tensor is as long as the prompts, and may or may not have a row for each.
        """
        if not self.shares[replica]:
            return None
        if not self.shared:
            return dict(self._arguments)
        return {name: self._share(name, value, self.shares[replica]) for name, value in self._arguments.items()}

    def noise(self, replica: int) -> contextlib.AbstractContextManager[Any]:
        """Entered while ``replica`` runs: random numbers are those of the whole batch."""
        if not self.shared:
            return contextlib.nullcontext()
        mine = self.shares[replica]
        return _SharedNoise(
            range(mine.start * self.repeats, mine.stop * self.repeats), self.prompts * self.repeats, len(self.shares)
        )

    def _share(self, name: str, value: Any, mine: range) -> Any:
        rows = _rows(value)
        if rows is None or name in FOR_ALL:
            return value
        if rows == self.prompts and PER_PROMPT.search(name):
            return value[mine.start : mine.stop]
        if rows == self.prompts * self.repeats and name == "latents":
            return value[mine.start * self.repeats : mine.stop * self.repeats]
        if rows == self.prompts:
            raise UnsupportedError(
                f"{name} is as long as the {self.prompts} prompts, and may or may not have an item for each: use dp=1"
            )
        return value


class _SharedNoise(TorchFunctionMode):
    """Makes ``torch.randn`` and ``torch.rand`` draw for the whole batch, and keeps the rows of this replica's images.

    So generators advance as they would with one replica, and each image gets its own noise.
    """

    def __init__(self, mine: range, whole: int, replicas: int) -> None:
        super().__init__()
        self._mine, self._whole, self._replicas = mine, whole, replicas

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.randn, torch.rand):
            shape = args or (kwargs.pop("size"),)
            shape = tuple(shape[0]) if not isinstance(shape[0], int) else shape
            return self._take(func.__name__, shape, lambda whole: func(whole, **kwargs))
        if func in (torch.randn_like, torch.rand_like):
            like = args[0]
            return self._take(func.__name__, like.shape, lambda whole: func(like.new_empty(whole), **kwargs))
        if getattr(func, "__name__", "") in RANDOM:
            raise self._refusal(f"calls {func.__name__}")
        return func(*args, **kwargs)

    def _take(self, name: str, shape: tuple[int, ...], draw: Any) -> Tensor:
        if len(shape) < 3 or shape[0] != len(self._mine):
            raise self._refusal(f"calls {name} for a tensor of shape {tuple(shape)}, not one row for each image")
        return draw((self._whole, *shape[1:]))[self._mine.start : self._mine.stop]

    def _refusal(self, does: str) -> UnsupportedError:
        return UnsupportedError(
            f"the pipeline {does}: its pictures would depend on how dp={self._replicas} replicas divide the prompts; "
            "give one prompt at a time, or use dp=1"
        )


def _rows(value: Any) -> int | None:
    """Items of a list, rows of a tensor or array; None for anything else."""
    if isinstance(value, (list, tuple)):
        return len(value)
    return value.shape[0] if isinstance(value, (Tensor, np.ndarray)) and value.ndim else None
