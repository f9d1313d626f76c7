"""The branches of classifier-free guidance (arXiv 2207.12598) on several ranks, whatever the pipeline does with them.

A pipeline calls its denoiser once or several times between two calls of ``scheduler.step``: once with all branches in
one batch, once a branch, or a mixture. The first such step is computed by every rank, and remembered: which calls, of
what shapes. From then on the rows of all its calls are dealt out evenly, a rank that doesn't compute a call gets lazy
tensors for its output, and at the step's last call one exchange fills them in.

Nothing here trusts the memory. A lazy tensor that is read early is computed by the rank that reads it, a step that
goes differently is computed by every rank and remembered in turn, and splitting a call's batch is tried against the
whole before it is relied upon. What ranks decide depends only on what is the same on all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from multicard import collectives
from multicard.errors import UnsupportedError
from multicard.guidance.batch import BatchPlan, NotSplittableError, merge_outputs, take_output
from multicard.guidance.exchange import Status, agree, exchange, fingerprint, pack, size_of, tensors_of, unpack
from multicard.guidance.lazy import Promise, promise_like, unwrap
from multicard.mesh import Axis
from multicard.partition import split

CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""How far a split batch may be from the whole, relative to the largest value: kernels differ with the batch."""
TRANSPARENT = (Tensor, bool, int, float, str, type(None), torch.dtype, torch.device)
"""Arguments that say all there is to say; a call with others (caches, generators) may change them: never left out."""


class Denoiser(Protocol):
    """What must be known of a denoiser."""

    @property
    def name(self) -> str: ...

    def run(self, kwargs: Mapping[str, Any]) -> Any:
        """Call it."""

    def freeze(self) -> Callable[[Mapping[str, Any]], Any]:
        """``run`` under the hooks that it has now, whichever it has when that is called."""


@dataclasses.dataclass(frozen=True, eq=False)
class Kind:
    """What one call is like.

    Attributes:
        key: its signature: two calls of the same have arguments and outputs of the same shapes.
        rows: rows of its batch.
        output: its output, with meta tensors.
        pure: its output is all that it leaves behind, so a rank may leave it out.
    """

    key: Hashable
    rows: int
    output: Any
    device: torch.device
    pure: bool


@dataclasses.dataclass(eq=False)
class Made:
    """A call of the current step. ``trial`` is kept where a split may have to be tried: arguments and whole output."""

    kind: Kind
    promise: Promise | None = None
    trial: tuple[Callable[[Mapping[str, Any]], Any], Mapping[str, Any], Any] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """The calls of a step, and the rows of each that every rank computes. ``number`` counts the steps remembered."""

    kinds: tuple[Kind, ...]
    shares: tuple[tuple[range, ...], ...]
    number: int

    def exchanged(self, call: int) -> bool:
        """Whether the output of that call travels: no rank computes it whole for itself alone."""
        return not all(len(share) == self.kinds[call].rows for share in self.shares[call])

    def sent(self, rank: int) -> list[tuple[int, list[Tensor]]]:
        """What ``rank`` sends: calls, and templates of the tensors of their outputs."""
        mine = [(i, shares[rank]) for i, shares in enumerate(self.shares) if shares[rank] and self.exchanged(i)]
        return [(i, tensors_of(_part(self.kinds[i], share))) for i, share in mine]


class Branches:
    """Gives the calls of a pipeline's denoisers to the ranks of an axis.

    ``call`` stands for every call of a denoiser, ``end_step`` for every ``scheduler.step``, ``finish`` for the
    pipeline's end. Collectives: two all-gathers a step (a fixed-size header, the outputs); in a step that is new, the
    header alone and an all-reduce.

    Args:
        axis: the cfg axis.
        plan: which arguments carry the batch.
        step_per_call: every call is a step of its own (a denoiser used without a pipeline).
    """

    def __init__(self, axis: Axis, plan: BatchPlan, *, step_per_call: bool = False) -> None:
        self.axis, self.plan, self.step_per_call = axis, plan, step_per_call
        self._steps: dict[Hashable, Step] = {}  # by the key of the first call
        self._may_split: dict[Hashable, bool] = {}  # by the key of the call, as tried
        self._remembered = 0
        self._running = False
        self._begin()

    def _begin(self) -> None:
        self._made: list[Made] = []
        self._step: Step | None = None  # the remembered step that this one follows so far
        self._packed: list[Tensor] = []
        self._status = Status.OK
        self._fingerprint = torch.zeros(0)
        self._device = torch.device("cpu")

    def call(self, denoiser: Denoiser, kwargs: Mapping[str, Any]) -> Any:
        """The denoiser's output, or lazy tensors for it.

        Raises:
            RankError: another rank's denoiser raised.
            MismatchError: ranks are in different steps or have different inputs.
        """
        if self._running:  # a denoiser inside a denoiser, or one wrapped twice
            return denoiser.run(kwargs)
        kwargs = unwrap(kwargs)
        key = _signature(denoiser.name, kwargs)
        if not self._made:
            tensors = tensors_of(kwargs)
            self._step = self._steps.get(key)
            self._fingerprint = fingerprint(tensors)
            self._device = tensors[0].device if tensors else self._device
        position = len(self._made)
        if self._step and (position == len(self._step.kinds) or self._step.kinds[position].key != key):
            self._step = None
        output = self._whole(denoiser, kwargs, key) if self._step is None else self._share(denoiser, kwargs, self._step)
        if self.step_per_call:
            self.end_step()
        return output

    def end_step(self) -> None:
        """A step has ended: whatever is still open is computed here; a step that was new is remembered."""
        made, step = self._made, self._step
        if not made:
            return
        for call in made:
            if call.promise is not None:
                call.promise.values()
        if step is None or len(made) < len(step.kinds):
            self._agree(Status.OK, (0, 0, len(made)))
            self._remember(made)
        self._begin()

    def finish(self, failed: bool = False) -> None:
        """The pipeline has ended; after a failure nothing is waited for."""
        if failed:
            self._begin()
        else:
            self.end_step()

    # One call

    def _compute(self, run: Callable[[Mapping[str, Any]], Any], kwargs: Mapping[str, Any]) -> Any:
        """Run a denoiser; if it raises, tell the others, who wait at the next exchange."""
        self._running = True
        try:
            return run(kwargs)
        except Exception:
            self._agree(Status.RAISED, (0, 0, 0))
            raise
        finally:
            self._running = False

    def _whole(self, denoiser: Denoiser, kwargs: Mapping[str, Any], key: Hashable) -> Any:
        rows = self.plan.rows(kwargs)
        keep = rows > 1 and key not in self._may_split
        trial_args = _copy(kwargs) if keep else None
        noise = _random_state(self._device)
        output = self._compute(denoiser.run, kwargs)
        pure = torch.equal(noise, _random_state(self._device)) and _is_transparent(kwargs)
        kind = Kind(key, rows, tree_map_only(Tensor, _template, output), self._device, pure)
        trial = (denoiser.freeze(), trial_args, _copy(output)) if trial_args is not None and pure else None
        self._made.append(Made(kind, trial=trial))
        return output

    def _share(self, denoiser: Denoiser, kwargs: Mapping[str, Any], step: Step) -> Any:
        position = len(self._made)
        kind, share = step.kinds[position], step.shares[position][self.axis.rank]
        whole, last = len(share) == kind.rows, position == len(step.kinds) - 1
        made = Made(kind)
        output = None
        if share:
            output = self._compute(denoiser.run, kwargs if whole else self.plan.take(kwargs, share, kind.rows))
            if step.exchanged(position):  # packed at once: the pipeline may write into its output
                self._pack(output, tensors_of(_part(kind, share)))
        if not whole and not last:
            run, kept = denoiser.freeze(), _copy(kwargs)
            templates = tensors_of(kind.output)
            made.promise, lazy = promise_like(templates, kind.device, lambda: self._late(run, kept, templates))
            output = _fill(kind.output, lazy)
        self._made.append(made)
        if not last:
            return output
        outputs = self._exchange(step)
        return output if whole else outputs[position]

    def _late(self, run: Callable[..., Any], kwargs: Mapping[str, Any], templates: Sequence[Tensor]) -> list[Tensor]:
        values = tensors_of(self._compute(run, kwargs))
        if not _same_shapes(values, templates):
            raise _changed()
        return values

    def _pack(self, output: Any, templates: Sequence[Tensor]) -> None:
        tensors = tensors_of(output)
        if _same_shapes(tensors, templates):
            self._packed.append(pack(tensors))
        else:
            self._status = Status.CHANGED

    # One step

    def _agree(self, status: Status, facts: tuple[int, int, int]) -> Tensor:
        return agree(self.axis, self._device, status, facts, self._fingerprint)

    def _exchange(self, step: Step) -> list[Any]:
        """The outputs of all calls of the step; those that nobody has read here are filled in."""
        if not any(step.exchanged(i) for i in range(len(step.kinds))):
            return [None] * len(step.kinds)
        statuses = self._agree(self._status, (1, step.number, len(step.kinds)))
        if (statuses == Status.CHANGED).any():
            raise _changed()
        sent = [step.sent(rank) for rank in range(self.axis.size)]
        sizes = [sum(size_of(templates) for _, templates in calls) for calls in sent]
        parts: list[list[Any]] = [[] for _ in step.kinds]
        for rank, buffer in enumerate(exchange(self.axis, self._packed, sizes, self._device)):
            flat = iter(unpack(buffer, [t for _, templates in sent[rank] for t in templates]))
            for i, templates in sent[rank]:
                part = _part(step.kinds[i], step.shares[i][rank])
                parts[i].append(_fill(part, [next(flat) for _ in templates]))
        outputs = [
            merge_outputs(pieces, kind.rows) if pieces else None for pieces, kind in zip(parts, step.kinds, strict=True)
        ]
        for made, output in zip(self._made, outputs, strict=True):
            if made.promise is not None:
                made.promise.keep(tensors_of(output))
        return outputs

    def _remember(self, made: Sequence[Made]) -> None:
        kinds = tuple(call.kind for call in made)
        shares = deal(kinds, self._may_split, self.axis.size)
        torn = [i for i, parts in enumerate(shares) if any(0 < len(part) < kinds[i].rows for part in parts)]
        untried = [i for i in torn if kinds[i].key not in self._may_split]
        self._steps.pop(kinds[0].key, None)
        if any(made[i].trial is None for i in untried):
            return  # to be learned once more, with a trial
        if untried:
            passed = torch.tensor([self._try(made[i], shares[i][self.axis.rank]) for i in untried], device=self._device)
            passed = collectives.all_reduce(passed.float(), self.axis, "min").cpu()
            self._may_split.update({kinds[i].key: bool(ok) for i, ok in zip(untried, passed, strict=True)})
            shares = deal(kinds, self._may_split, self.axis.size)
        self._remembered += 1
        self._steps[kinds[0].key] = Step(kinds, shares, self._remembered)

    def _try(self, made: Made, share: range) -> bool:
        """Whether this rank's share of the call's batch, by itself, gives what the whole gives."""
        assert made.trial is not None
        run, kwargs, output = made.trial
        rows = made.kind.rows
        if not 0 < len(share) < rows:
            return True
        self._running = True
        noise = _random_state(self._device)
        try:
            part = tensors_of(run(self.plan.take(kwargs, share, rows)))
            wanted = tensors_of(take_output(output, share, rows))
        except Exception:  # whatever it is, the whole went well: the split is what doesn't
            return False
        finally:
            self._running = False
            _set_random_state(self._device, noise)
        return _same_shapes(part, wanted) and all(map(_close, part, wanted))


def deal(kinds: Sequence[Kind], may_split: Mapping[Hashable, bool], ranks: int) -> tuple[tuple[range, ...], ...]:
    """For every call the rows that each rank computes: even shares of the rows of all calls, in order.

    A call that can't be split goes to the rank that its middle row falls to. A call that isn't pure, and a single one
    that can't be split, is computed by every rank.
    """
    pure = [kind for kind in kinds if kind.pure]
    turns = split(sum(kind.rows for kind in pure), ranks)
    shares: list[tuple[range, ...]] = []
    start = 0
    for kind in kinds:
        splits = _has_rows(kind) and may_split.get(kind.key, True)
        if not kind.pure or (len(pure) == 1 and not splits):
            shares.append((range(kind.rows),) * ranks)
            continue
        if splits:
            shares.append(tuple(_overlap(turn, start, kind.rows) for turn in turns))
        else:
            middle = start + (kind.rows - 1) // 2
            shares.append(tuple(range(kind.rows if middle in turn else 0) for turn in turns))
        start += kind.rows
    return tuple(shares)


def _overlap(turn: range, start: int, rows: int) -> range:
    first, end = max(turn.start - start, 0), min(turn.stop - start, rows)
    return range(first, end) if first < end else range(0)


def _has_rows(kind: Kind) -> bool:
    try:
        return kind.rows > 1 and bool(take_output(kind.output, range(1), kind.rows) is not None)
    except NotSplittableError:
        return False


def _part(kind: Kind, share: range) -> Any:
    return kind.output if len(share) == kind.rows else take_output(kind.output, share, kind.rows)


def _signature(name: str, kwargs: Mapping[str, Any]) -> Hashable:
    """Shapes, dtypes and structure, without the values of numbers: timesteps change, shapes don't follow them."""
    leaves, spec = tree_flatten(dict(kwargs))
    return (name, spec, *(_describe(leaf) for leaf in leaves))


def _describe(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.dtype, leaf.device)
    return leaf if isinstance(leaf, (bool, str, type(None), torch.dtype)) else type(leaf)


def _is_transparent(kwargs: Mapping[str, Any]) -> bool:
    return all(isinstance(leaf, TRANSPARENT) for leaf in tree_flatten(dict(kwargs))[0])


def _copy(tree: Any) -> Any:
    return tree_map_only(Tensor, Tensor.clone, tree)


def _template(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _fill(template: Any, tensors: Sequence[Tensor]) -> Any:
    values = iter(tensors)
    return tree_map_only(Tensor, lambda _: next(values), template)


def _same_shapes(tensors: Sequence[Tensor], templates: Sequence[Tensor]) -> bool:
    return [(t.shape, t.dtype) for t in tensors] == [(t.shape, t.dtype) for t in templates]


def _close(part: Tensor, whole: Tensor) -> bool:
    if not part.is_floating_point():
        return torch.equal(part, whole)
    scale = whole.abs().amax().clamp(min=1e-12) if whole.numel() else 1.0
    return bool(((part - whole).abs() <= CLOSE.get(part.dtype, 1e-4) * scale).all())


def _changed() -> UnsupportedError:
    return UnsupportedError(
        "the denoiser's output changed its shape between two steps whose inputs have the same shapes: "
        "run this pipeline with cfg=1"
    )


def _random_state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)
