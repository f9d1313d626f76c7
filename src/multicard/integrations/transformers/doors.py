"""The door of a split ``transformers`` model: every outermost call goes through it.

Ranks compare their inputs there, and the seams into the library prove that they were used.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from multicard.integrations.adapters import AdapterState
from multicard.integrations.calls import named, parameters
from multicard.integrations.intercept import DOOR, Plain, intercept
from multicard.integrations.seams import Hooks, RowProof, bypassed, counted
from multicard.integrations.transformers.heads import ATTENDED, SEGMENTED
from multicard.layers import ColumnParallelLinear, VocabParallelEmbedding
from multicard.mesh import ParallelMesh
from multicard.replica import Replica

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from multicard.integrations.transformers.sequence import Sequence


def open_door(model: PreTrainedModel, mesh: ParallelMesh, hooks: Hooks, sequence: Sequence | None) -> None:
    """Put a door on every later call of ``model``, and on direct calls of the model below its head.

    Args:
        hooks: the hooks that the split relies on.
        sequence: how the sequence is split; None: it isn't.
    """
    door = ModelDoor(model, mesh, hooks, sequence)
    below = model.base_model if sequence is None else model.get_decoder()
    for module in {model, below}:
        intercept(module, "__call__", door, "call")


def is_split(model: nn.Module) -> bool:
    """Whether the model has a door."""
    return isinstance(vars(model).get(DOOR), ModelDoor)


class ModelDoor:
    """One model's door."""

    def __init__(self, model: PreTrainedModel, mesh: ParallelMesh, hooks: Hooks, sequence: Sequence | None) -> None:
        self._model, self._hooks, self._sequence = model, hooks, sequence
        self._replica = Replica(mesh)
        self._adapters = AdapterState(model)
        self._rows = RowProof("transformers", model)
        self._tables = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
        self._segmented = [m for m in model.modules() if _attends_by_segments(m)]
        self._seen: set[Any] = set()
        self._inside = False

    def __deepcopy__(self, memo: Any) -> ModelDoor:
        return self

    def traced(self, module: nn.Module) -> None:
        """Compiled code goes around this door: a split sequence refuses that itself, and tp needs no door."""

    def call(self, module: nn.Module, plain: Plain, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The model's ``__call__``. One small all-reduce an axis besides its own collectives."""
        if self._inside:
            return plain(*args, **kwargs)
        given = named(parameters(type(module).forward), args, kwargs)
        weights = next(module.parameters()).dtype
        compared = {**given, "its weights": weights, **self._adapters.facts()}
        self._replica.compare(f"a call of {type(module).__name__}", compared)
        self._hooks.check()
        self._inside = True
        try:
            return self._proved(module, plain, args, kwargs, given)
        finally:
            self._inside = False

    def _proved(
        self, module: nn.Module, plain: Plain, args: Any, kwargs: Mapping[str, Any], given: Mapping[str, Any]
    ) -> Any:
        if self._sequence is not None:
            self._sequence.begin_call(given)
        kind = (type(module), _is_step(given))
        output = plain(*args, **kwargs) if kind in self._seen else self._first(kind, plain, args, kwargs, given)
        if self._sequence is not None:
            self._sequence.end_call()
        self._check_logits(output)
        return output

    def _first(self, kind: Any, plain: Plain, args: Any, kwargs: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
        """The first call of its kind, with counting hooks."""
        tables = self._tables
        for module in self._segmented:
            vars(module)[ATTENDED] = False  # a flag: compiled code would take a count for a constant
        with counted([*tables, *self._segmented]) as calls, self._rows(kind):
            output = plain(*args, **kwargs)
        if tables and isinstance(given.get("input_ids"), Tensor) and not any(calls[table] for table in tables):
            raise bypassed("transformers", "token ids were looked up without the vocabulary-parallel embedding")
        for module in self._segmented:
            if calls[module] and not vars(module)[ATTENDED]:
                raise bypassed(
                    "transformers", f"{type(module).__name__} didn't call its segment-wise attention function"
                )
        self._seen.add(kind)
        return output

    def _check_logits(self, output: Any) -> None:
        logits, head = getattr(output, "logits", None), self._head
        if head is not None and isinstance(logits, Tensor) and logits.shape[-1] != head.out_features:
            raise bypassed(
                "transformers",
                f"{logits.shape[-1]} logits came out for a vocabulary of {head.out_features}: the head's shards "
                "weren't gathered",
            )

    @functools.cached_property
    def _head(self) -> ColumnParallelLinear | None:
        try:
            head = self._model.get_output_embeddings()
        except NotImplementedError:
            return None
        return head if isinstance(head, ColumnParallelLinear) else None


def _is_step(given: Mapping[str, Any]) -> bool:
    """Whether the call has one new token, as in decoding."""
    tokens = given.get("input_ids")
    return isinstance(tokens, Tensor) and tokens.dim() == 2 and tokens.shape[1] == 1


def _attends_by_segments(module: nn.Module) -> bool:
    config = vars(module).get("config")
    return config is not None and getattr(config, "_attn_implementation", None) == SEGMENTED
