"""Sequence parallelism for diffusers' transformers: hooks split and gather image tokens; ``attend`` computes attention.

All attention in diffusers, through the library's dispatcher or its own processors, calls torch's
``scaled_dot_product_attention``; inside the modules that the plan names, :func:`multicard.attend` replaces that call.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from multicard import collectives
from multicard.attention.attend import attend
from multicard.errors import UnsupportedError
from multicard.integrations.calls import changed, named, parameters
from multicard.integrations.diffusers.checks import check_sequence
from multicard.integrations.diffusers.families import SequencePlan
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
        check_sequence(model, plan)
        self.mesh, self.plan = mesh, plan
        self._model, self._name = model, type(model).__name__
        model.__dict__[SPLIT] = self
        self._length: int | None = None  # of the split sequence, on all ranks together; None: none is split now
        self._outer: Tensor | None = None  # the value of the plan's outer_mask, during a forward
        self._hooks = Hooks("diffusers")
        self._attentions: set[nn.Module] = set()
        self._count()
        self._place()

    def _place(self) -> None:
        """Put hooks on the modules that the plan names."""
        model, plan, hooks = self._model, self.plan, self._hooks
        self._hooked = {path: module for pattern in plan.patterns for path, module in matching(model, pattern)}
        hooks.before(model, functools.partial(self._begin, _names(model)), prepend=True)
        for pattern, dims in plan.inputs.items():
            for _, module in matching(model, pattern):
                hooks.before(module, functools.partial(self._split_inputs, _names(module), dims))
        for pattern, numbers in plan.outputs.items():
            for _, module in matching(model, pattern):
                hooks.after(module, functools.partial(self._split_outputs, numbers))
        for pattern, dim in plan.gather.items():
            for _, module in matching(model, pattern):
                hooks.after(module, functools.partial(self._gather, dim))
        for pattern in plan.attention:
            for path, module in matching(model, pattern):
                hooks.before(module, self._call_attention)
                if module not in self._attentions:
                    self._attentions.add(module)
                    module.forward = self._attending(module.forward, path)
        hooks.after(model, self._end, always_call=True)

    def renew(self) -> None:
        """Move the hooks to layers that have replaced a planned one since (peft wraps a layer in an adapter)."""
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
        if self._attended != self._called or not self._attended:
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
        self._called += self._length is not None

    def _attending(self, forward: Callable[..., Any], path: str) -> Callable[..., Any]:
        @functools.wraps(forward)
        def attending(*args: Any, **kwargs: Any) -> Any:
            if self._length is None:  # called directly, outside the model
                return forward(*args, **kwargs)
            mode = _Attend(self)
            with mode:  # not "as mode": Dynamo can't trace that value
                output = forward(*args, **kwargs)
            if not mode.attended:
                raise UnsupportedError(
                    f"{path} doesn't call torch's scaled_dot_product_attention: give it diffusers' default "
                    "processor and set_attention_backend('native')"
                )
            self._attended += 1
            return output

        return attending

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """``scaled_dot_product_attention`` on this rank's rows: (B, H, joint + local, D) to the same."""
        assert self._length is not None
        local = len(self._shares()[self.mesh.sequence.rank])
        tokens = query.shape[2] - local
        if tokens < 0 or key.shape[2] != query.shape[2] or (is_causal and tokens):
            raise UnsupportedError(
                f"{self._name}: attention from {query.shape[2]} to {key.shape[2]} tokens where {local} of "
                f"{self._length} image tokens are here: its sequence plan doesn't cover this"
            )
        first = self.plan.joint == "front"
        sizes = (tokens, local) if first else (local, tokens)
        kept = None if self._outer is None else self._outer_rows(self._outer, tokens, first)
        if kept is not None and kept.dtype == torch.bool:
            attn_mask = kept[:, None, None, :]
        elif kept is not None:
            scale = query.shape[3] ** -0.5 if scale is None else scale
            query, key = _biased(query, key, kept, scale)
        parts = [x.split(sizes, 2) for x in (query, key, value)]
        joint = [p[0 if first else 1] for p in parts]
        image = [p[1 if first else 0] for p in parts]
        joint_mask, key_mask = self._masks(attn_mask, query, sizes, first)
        out = attend(
            image[0],
            image[1],
            image[2],
            mesh=self.mesh,
            causal=is_causal,
            key_mask=key_mask,
            scale=scale,
            layout="BNSD",
            seq_len=self._length,
            joint=(joint[0], joint[1], joint[2]) if tokens else None,
            joint_position=self.plan.joint,
            joint_key_mask=joint_mask,
        )
        if not isinstance(out, Tensor):
            out = torch.cat([out[1], out[0]] if first else [out[0], out[1]], 2)
        if kept is not None and kept.dtype == torch.bool:  # such queries attend to nothing, which gives zeros
            out = out.masked_fill(~kept[:, None, :, None], 0)
        return out

    def _outer_rows(self, mask: Tensor, tokens: int, first: bool) -> Tensor:
        """``mask`` of the joint tokens and of this rank's image tokens, in their order."""
        assert self._length is not None
        if (
            mask.dim() != 2
            or mask.shape[1] != tokens + self._length
            or not (mask.dtype == torch.bool or mask.is_floating_point())
        ):
            raise UnsupportedError(
                f"{self._name}: {self.plan.outer_mask} {tuple(mask.shape)} of {mask.dtype} isn't one number for each "
                f"of {tokens} + {self._length} tokens; use cfg, tp or dp"
            )
        mine = self._shares()[self.mesh.sequence.rank]
        if first:
            return torch.cat([mask[:, :tokens], mask[:, tokens:][:, mine.start : mine.stop]], 1)
        return torch.cat([mask[:, mine.start : mine.stop], mask[:, self._length :]], 1)

    def check_adapter(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> None:
        if key.shape[2] == query.shape[2]:
            raise UnsupportedError(
                f"{self._name}: an attention module attends to the sequence twice (perturbed attention guidance?); "
                "its sequence plan doesn't cover this; use cfg, tp or dp"
            )

    def _masks(
        self, mask: Tensor | None, query: Tensor, sizes: tuple[int, int], first: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The mask of the joint keys and that of the image keys, ``(B, keys)`` bool, out of one over keys alone."""
        if mask is None:
            return None, None
        same_rows = mask.dim() == 4 and all(mask.shape[d] == 1 or mask.stride(d) == 0 for d in (1, 2))
        if not same_rows or mask.dtype != torch.bool:
            raise UnsupportedError(
                f"{self._name}: an attention mask {tuple(mask.shape)} of {mask.dtype} isn't one over keys alone; "
                "use cfg, tp or dp"
            )
        keys = mask[:, 0, 0].expand(query.shape[0], -1)
        a, b = keys.split(sizes, 1)
        joint, image = (a, b) if first else (b, a)
        return (joint if joint.shape[1] else None), image


class _Attend(TorchFunctionMode):
    """Replaces the first ``scaled_dot_product_attention``; later ones (adapters) attend to their own, whole keys.

    Raises UnsupportedError if a later one is over the sequence again (perturbed attention guidance).
    """

    def __init__(self, sequence: SequenceSplit) -> None:
        super().__init__()
        self.sequence, self.attended = sequence, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            if not self.attended:
                self.attended = True
                return self.sequence.attend(*args, **(kwargs or {}))
            self.sequence.check_adapter(*args, **(kwargs or {}))
        if func is Tensor.unflatten:
            func = torch.unflatten  # under a mode, Dynamo can't trace this method, since it is built into Python
        return func(*args, **(kwargs or {}))


def _biased(query: Tensor, key: Tensor, rows: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One more feature, which adds the outer product of ``rows`` ``(B, S)`` with itself to ``query·key·scale``."""
    more = rows[:, None, :, None].to(query.dtype).expand(query.shape[0], query.shape[1], -1, 1)
    return torch.cat([query, more / scale], 3), torch.cat([key, more], 3)


def _names(module: nn.Module) -> tuple[str, ...]:
    """Parameters of a module's forward; read when a hook is placed, since Dynamo can't trace signatures in hooks."""
    return parameters(type(module).forward)
