"""Sequence parallel for diffusers' transformers: hooks split and gather image tokens, attention goes through attend."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from multicard import collectives
from multicard.errors import UnsupportedError
from multicard.integrations.calls import changed, named, parameters
from multicard.integrations.diffusers.attention import SplitAttention
from multicard.integrations.diffusers.families import SequencePlan
from multicard.integrations.diffusers.hooks import innermost, own_hooks, stateful_hooks
from multicard.integrations.diffusers.plans import matching
from multicard.integrations.seams import Hooks, bypassed
from multicard.mesh import ParallelMesh
from multicard.partition import split

SPLIT = "_multicard_sequence"


def shares_sequence(model: nn.Module, mesh: ParallelMesh) -> bool:
    """Whether the model's sequence is already split, as for a component of two pipelines.

    Raises:
        UnsupportedError: it is split with other degrees.
    """
    split = split_of(model)
    if split is None:
        return False
    ring, ulysses = split.mesh.ring.size, split.mesh.ulysses.size
    if (ring, ulysses) != (mesh.ring.size, mesh.ulysses.size):
        name = type(model).__name__
        raise UnsupportedError(f"{name} is already split by ring={ring} and ulysses={ulysses}: load the model again")
    return True


def split_of(model: nn.Module) -> SequenceSplit | None:
    """How the model's sequence is split; None: it isn't."""
    return model.__dict__.get(SPLIT)


class SequenceSplit:
    """One model's image tokens, split over ``mesh.sequence``; every rank makes the same calls of the model."""

    def __init__(self, model: nn.Module, mesh: ParallelMesh, plan: SequencePlan) -> None:
        self.mesh, self.plan = mesh, plan
        self._model, self._name = model, type(model).__name__
        model.__dict__[SPLIT] = self
        self._length: int | None = None  # of the split sequence, on all ranks together; None: none is split now
        self._outer: Tensor | None = None  # the value of the plan's outer_mask, during a forward
        self._hooks = Hooks("diffusers")
        self._attentions: dict[nn.Module, Callable[..., Any]] = {}  # with the forward that we gave it
        self._may_skip: set[nn.Module] = set()  # attention modules whose work a cache may skip
        self._cached = False
        self._count()
        self._place()

    def _place(self) -> None:
        """Put hooks on the modules that the plan names."""
        model, plan, hooks = self._model, self.plan, self._hooks

        def planned(rules: Mapping[str, Any]) -> Iterator[tuple[nn.Module, Any]]:
            return ((module, rule) for pattern, rule in rules.items() for _, module in matching(model, pattern))

        self._hooked = {path: module for pattern in plan.patterns for path, module in matching(model, pattern)}
        hooks.before(model, functools.partial(self._begin, _names(model)), prepend=True)
        for module, dims in planned(plan.inputs):
            hooks.before(module, functools.partial(self._split_inputs, _names(module), dims))
        for module, numbers in planned(plan.outputs):
            hooks.after(module, functools.partial(self._split_outputs, numbers))
        for module, dim in planned(plan.gather):
            hooks.after(module, functools.partial(self._gather, dim))
        for pattern in plan.attention:
            for path, module in matching(model, pattern):
                hooks.before(module, self._call_attention)
                if module not in self._attentions:
                    owner, name = innermost(module)
                    self._attentions[module] = self._attending(module, getattr(owner, name), path)
                    setattr(owner, name, self._attentions[module])
        hooks.after(model, self._end, always_call=True)

    @property
    def length(self) -> int | None:
        """The length of the split sequence on all ranks together; None: none is split now."""
        return self._length

    @property
    def mine(self) -> range | None:
        """This rank's tokens of the split sequence."""
        return None if self._length is None else self._shares()[self.mesh.sequence.rank]

    def renew(self) -> None:
        """Move the hooks to layers that have replaced a planned one since (peft wraps a layer in an adapter).

        Also find the attention modules that caches of diffusers may skip now.
        """
        self._cached = any(True for _ in stateful_hooks(self._model))
        self._may_skip = {
            module
            for module, ours in self._attentions.items()
            if any(hook._is_stateful for hook in own_hooks(module)) and getattr(*innermost(module)) is ours
        }
        if any(self._model.get_submodule(path) is not module for path, module in self._hooked.items()):
            self._hooks.remove()
            self._place()

    # Proof

    def _count(self) -> None:
        """Reset the counts of split tensors and of attention modules, called and computed by us, and the open split."""
        self._splits = self._called = self._attended = 0
        self._left_open = False

    @contextlib.contextmanager
    def proved(self) -> Iterator[None]:
        """Entered while the model runs; raises UnsupportedError afterwards unless it was split as planned."""
        self._hooks.check()
        self._count()
        yield
        if not self._splits:
            raise bypassed("diffusers", f"nothing of {self._name}'s sequence was split")
        if self._attended != self._called or not (self._attended or self._cached):
            raise bypassed(
                "diffusers",
                f"{self._called} attention modules of {self._name} ran on a split sequence, and multicard.attend "
                f"computed {self._attended}",
            )
        if self._left_open:
            raise bypassed("diffusers", f"{self._name}'s split sequence was never gathered")

    # Hooks

    def _begin(self, names: Sequence[str], module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._length = self._outer = None
        arguments = named(names, args, kwargs)
        for name, allowed in self.plan.refused.items():
            if name in arguments and not any(arguments[name] is value for value in allowed):
                raise UnsupportedError(f"{self._name}: {name} isn't covered by its sequence plan; use cfg, tp or dp")
        if self.plan.outer_mask is None:
            return None
        self._outer = arguments.get(self.plan.outer_mask)
        return changed(names, args, kwargs, {self.plan.outer_mask: lambda mask: None})

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._left_open = self._length is not None
        self._length = self._outer = None

    def _split_inputs(
        self, names: Sequence[str], dims: Mapping[str, int], module: nn.Module, args: Any, kwargs: Any
    ) -> Any:
        take = {name: functools.partial(self._take, dim=dim, what=name) for name, dim in dims.items()}
        return changed(names, args, kwargs, take)

    def _split_outputs(self, numbers: Mapping[int, int], module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self._take(output, numbers[0], type(module).__name__)
        what = f"an output of {type(module).__name__}"
        return tuple(self._take(x, numbers[i], what) if i in numbers else x for i, x in enumerate(output))

    def _take(self, value: Any, dim: int, what: str) -> Any:
        """This rank's slice. The first split tensor sets the sequence's length until it is gathered."""
        if isinstance(value, (list, tuple)):
            return type(value)(self._take(item, dim, what) for item in value)
        if not isinstance(value, Tensor) or not -value.dim() <= dim < value.dim():
            return value
        if self._length is None:
            self._length = value.shape[dim]
        elif value.shape[dim] == 1:
            return value
        elif value.shape[dim] != self._length:
            raise UnsupportedError(
                f"{self._name}: {what} has {value.shape[dim]} rows for {self._length} image tokens; its sequence plan "
                "doesn't cover this; use cfg, tp or dp"
            )
        mine = self._shares()[self.mesh.sequence.rank]
        self._splits += 1
        return value.narrow(dim, mine.start, len(mine))

    def _gather(self, dim: int, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        whole = collectives.all_gather(output, self.mesh.sequence, dim, [len(share) for share in self._shares()])
        self._length = None  # the next split may be of another sequence
        return whole

    def _shares(self) -> tuple[range, ...]:
        assert self._length is not None
        return split(self._length, self.mesh.sequence.size)

    # Attention

    def _call_attention(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._called += self._length is not None and module not in self._may_skip

    def _attending(self, module: nn.Module, forward: Callable[..., Any], path: str) -> Callable[..., Any]:
        @functools.wraps(forward)
        def attending(*args: Any, **kwargs: Any) -> Any:
            if self._length is None:  # called directly, outside the model
                return forward(*args, **kwargs)
            mode = SplitAttention(self._name, self.plan, self.mesh, self._length, self._outer)
            with mode:  # not "as mode": Dynamo has no value for that
                output = forward(*args, **kwargs)
            if not mode.attended:
                raise UnsupportedError(
                    f"{path} doesn't call torch's scaled_dot_product_attention: give it diffusers' default "
                    "processor and set_attention_backend('native')"
                )
            self._attended += 1
            self._called += module in self._may_skip
            return output

        return attending


def _names(module: nn.Module) -> tuple[str, ...]:
    """Parameters of a module's forward; read when a hook is placed, since Dynamo can't trace signatures in hooks."""
    return parameters(type(module).forward)
