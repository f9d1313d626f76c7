"""The branches of classifier-free guidance (arXiv 2207.12598) on several ranks, whatever the pipeline does with them.

A pipeline calls its denoiser once or several times between two calls of ``scheduler.step``: once with all branches in
one batch, once a branch, or a mixture. Every rank computes the first such step and records its calls and their shapes.
From then on the rows of all calls are divided evenly over ranks; a rank that doesn't compute a call gets lazy tensors
as its output, and at the step's last call one exchange fills them in.

The result doesn't depend on the record being right. A lazy tensor that is read early is computed by the rank that reads
it; a step that differs from the record is computed and recorded by every rank; and before a call's batch is split, the
split call is compared with the whole one. Ranks decide only by facts that are the same on all of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from multicard import collectives
from multicard.axis import Axis
from multicard.errors import RankError, UnsupportedError
from multicard.guidance.batch import BatchPlan, merge_outputs
from multicard.guidance.exchange import Agreed, agree, exchange, pack, size_of, total, unpack
from multicard.guidance.lazy import Promise, promise_like, unwrap
from multicard.guidance.step import Kind, Part, Step, deal, is_torn, part_of
from multicard.guidance.trees import clone, fill, is_transparent, same_shapes, signature, template, tensors_of
from multicard.guidance.trial import passes, random_state
from multicard.replica import Status

CHANGES = 2
"""After so many state-changing calls a denoiser is assumed to keep state, not just to fill caches for a new shape."""


class Denoiser(Protocol):
    """The interface of a denoiser."""

    @property
    def name(self) -> str: ...

    @property
    def keeps(self) -> bool:
        """Whether a rank that hasn't made one call can't make the next, since something is kept from call to call."""

    def run(self, kwargs: Mapping[str, Any], part: Part | None = None) -> Any:
        """Call it; ``kwargs`` have only this part of the batch; None: all of it."""

    def skip(self, part: Part) -> None:
        """Other ranks call it now; ``part`` has no rows."""

    def state(self) -> object:
        """A snapshot of its state besides parameters: equal before and after a call without side effects."""

    def freeze(self, fresh: bool = False) -> Callable[[Mapping[str, Any]], Any]:
        """``run`` with the denoiser's current hooks, even if others are in place when it is called.

        Args:
            fresh: as if it were the first call; what is kept from call to call isn't used or changed.
        """


@dataclasses.dataclass(eq=False)
class Made:
    """A call of the current step. ``trial`` has arguments and whole output if a split may have to be tried."""

    kind: Kind
    keeps: bool = False
    promise: Promise | None = None
    trial: tuple[Callable[[Mapping[str, Any]], Any], Mapping[str, Any], Any] | None = None


class Branches:
    """Divides the calls of a pipeline's denoisers over the ranks of an axis.

    ``call`` replaces every call of a denoiser; ``end_step`` is called at every ``scheduler.step``, ``finish`` at the
    pipeline's end. Collectives: a small all-reduce (the header) and an all-gather (the outputs) a step; in a new step
    the header and one more all-reduce.

    Args:
        axis: the cfg axis.
        plan: which arguments carry the batch.
        step_per_call: every call is a step of its own (a denoiser used without a pipeline).
    """

    def __init__(self, axis: Axis, plan: BatchPlan, *, step_per_call: bool = False) -> None:
        self.axis, self.plan, self.step_per_call = axis, plan, step_per_call
        self._steps: dict[Hashable, Step] = {}  # by the key of the first call
        self._may_split: dict[Hashable, bool] = {}  # by the key of the call: the result of its trial
        self._changes: Counter[Hashable] = Counter()  # by the key of the call: how many of its calls changed state
        self._remembered = 0
        self._running = False
        self._begin()

    def _begin(self) -> None:
        self._made: list[Made] = []
        self._step: Step | None = None  # the recorded step that this one has followed so far
        self._packed: list[Tensor] = []
        self._status = Status.OK
        self._drifts = self._told = False
        self._device = torch.device("cpu")

    def call(self, denoiser: Denoiser, kwargs: Mapping[str, Any]) -> Any:
        """The denoiser's output, or lazy tensors for it.

        Raises:
            RankError: another rank's denoiser raised.
            MismatchError: ranks are in different steps.
        """
        if self._running:  # a denoiser inside a denoiser, or wrapped twice
            return denoiser.run(kwargs)
        kwargs = unwrap(kwargs)
        key = signature(denoiser.name, kwargs)
        if not self._made:
            tensors = tensors_of(kwargs)
            self._step = self._steps.get(key)
            self._device = tensors[0].device if tensors else self._device
        position = len(self._made)
        if self._step and (position == len(self._step.kinds) or self._step.kinds[position].key != key):
            self._step = None
        output = self._whole(denoiser, kwargs, key) if self._step is None else self._share(denoiser, kwargs, self._step)
        if self.step_per_call:
            self.end_step()
        return output

    def end_step(self) -> bool:
        """End a step: open calls are computed here; a new step is recorded.

        Returns:
            whether ranks' numbers may differ by rounding: one computed a whole batch that others joined from parts.

        Raises:
            UnsupportedError: it has fewer calls than the last one, of a denoiser that keeps something between calls.
        """
        made, step, drifts = self._made, self._step, self._drifts
        if not made:
            return False
        if step and len(made) < len(step.kinds) and any(c.keeps and step.exchanged(i) for i, c in enumerate(made)):
            raise UnsupportedError(
                f"a step ended after {len(made)} of {len(step.kinds)} calls of a denoiser whose cache between steps is "
                "only on the ranks that make them: disable the cache (disable_cache()), or use cfg=1"
            )
        for call in made:
            if call.promise is not None:
                call.promise.values()
        if step is None or len(made) < len(step.kinds):
            self._agree(Status.OK, (0, 0, len(made)))
            self._remember(made)
        self._begin()
        return drifts

    def finish(self, failed: bool = False) -> None:
        """The pipeline has ended; after a failure, don't wait for other ranks."""
        if failed:
            self._begin()
        else:
            self.end_step()

    # One call

    def _compute(self, run: Callable[[Mapping[str, Any]], Any], kwargs: Mapping[str, Any]) -> Any:
        """Run a denoiser; if it raises, tell the other ranks, which wait at the next exchange."""
        self._running = True
        try:
            return run(kwargs)
        except Exception:
            if not self._told:
                self._agree(Status.RAISED, (0, 0, 0))
            raise
        finally:
            self._running = False

    def _total(self, numbers: tuple[float, float]) -> tuple[float, float]:
        """``numbers`` summed over ranks, inside a call of which each computes a part."""
        try:
            return total(self.axis, self._device, numbers)
        except RankError:
            self._told = True  # all ranks know
            raise

    def _whole(self, denoiser: Denoiser, kwargs: Mapping[str, Any], key: Hashable) -> Any:
        rows = self.plan.rows(kwargs)
        keep = rows > 1 and key not in self._may_split
        trial_args = clone(kwargs) if keep else None
        noise, state = random_state(self._device), denoiser.state()
        output = self._compute(denoiser.run, kwargs)
        if changed := denoiser.state() != state:
            self._changes[key] += 1
        pure = not changed and torch.equal(noise, random_state(self._device)) and is_transparent(kwargs)
        kind = Kind(key, rows, tree_map_only(Tensor, template, output), self._device, pure)
        trial = (denoiser.freeze(fresh=True), trial_args, clone(output)) if trial_args is not None and pure else None
        self._made.append(Made(kind, denoiser.keeps, trial=trial))
        return output

    def _share(self, denoiser: Denoiser, kwargs: Mapping[str, Any], step: Step) -> Any:
        position = len(self._made)
        kind, share = step.kinds[position], step.shares[position][self.axis.rank]
        whole, last = len(share) == kind.rows, position == len(step.kinds) - 1
        made = Made(kind, denoiser.keeps)
        output = None
        part = Part(step.shares[position], self.axis.rank, kind.rows, self._total if step.torn(position) else None)
        if not share:
            self._compute(lambda _: denoiser.skip(part), {})
        else:
            mine = kwargs if whole else self.plan.take(kwargs, share, kind.rows)
            output = self._compute(functools.partial(denoiser.run, part=part), mine)
            if step.exchanged(position):  # packed at once: the pipeline may write into its output
                self._pack(output, tensors_of(part_of(kind, share)))
        if not whole and not last:
            run, kept = denoiser.freeze(), clone(kwargs)
            templates = tensors_of(kind.output)
            made.promise, lazy = promise_like(templates, kind.device, lambda: self._late(run, kept, templates))
            output = fill(kind.output, lazy)
        self._made.append(made)
        if not last:
            return output
        outputs = self._exchange(step)
        return output if whole else outputs[position]

    def _late(self, run: Callable[..., Any], kwargs: Mapping[str, Any], templates: Sequence[Tensor]) -> list[Tensor]:
        values = tensors_of(self._compute(run, kwargs))
        if not same_shapes(values, templates):
            raise _changed()
        return values

    def _pack(self, output: Any, templates: Sequence[Tensor]) -> None:
        tensors = tensors_of(output)
        if same_shapes(tensors, templates):
            self._packed.append(pack(tensors))
        else:
            self._status = Status.CHANGED

    # One step

    def _agree(self, status: Status, facts: tuple[int, int, int], early: bool = False) -> Agreed:
        return agree(self.axis, self._device, status, facts, early)

    def _exchange(self, step: Step) -> list[Any]:
        """The outputs of all calls of the step; fills in those that this rank hasn't read."""
        if not any(step.exchanged(i) for i in range(len(step.kinds))):
            return [None] * len(step.kinds)
        early = any(made.promise is not None and made.promise.kept for made in self._made)
        agreed = self._agree(self._status, (1, step.number, len(step.kinds)), early)
        if agreed.changed:
            raise _changed()
        self._drifts = agreed.early and any(step.torn(i) for i in range(len(step.kinds)))
        sent = [step.sent(rank) for rank in range(self.axis.size)]
        sizes = [sum(size_of(templates) for _, templates in calls) for calls in sent]
        parts: list[list[Any]] = [[] for _ in step.kinds]
        for rank, buffer in enumerate(exchange(self.axis, self._packed, sizes, self._device)):
            flat = iter(unpack(buffer, [t for _, templates in sent[rank] for t in templates]))
            for i, templates in sent[rank]:
                part = part_of(step.kinds[i], step.shares[i][rank])
                parts[i].append(fill(part, [next(flat) for _ in templates]))
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
        torn = [i for i, parts in enumerate(shares) if is_torn(parts, kinds[i].rows)]
        untried = [i for i in torn if kinds[i].key not in self._may_split]
        self._steps.pop(kinds[0].key, None)
        fills_caches = any(0 < self._changes[kind.key] < CHANGES for kind in kinds if not kind.pure)
        if fills_caches or any(made[i].trial is None for i in untried):
            return  # it will be recorded again
        if untried:
            passed = torch.tensor(
                [self._passes(made[i], shares[i][self.axis.rank]) for i in untried], device=self._device
            )
            passed = collectives.all_reduce(passed.float(), self.axis, "min").cpu()
            self._may_split.update({kinds[i].key: bool(ok) for i, ok in zip(untried, passed, strict=True)})
            shares = deal(kinds, self._may_split, self.axis.size)
        self._remembered += 1
        self._steps[kinds[0].key] = Step(kinds, shares, self._remembered)

    def _passes(self, made: Made, share: range) -> bool:
        assert made.trial is not None
        run, kwargs, output = made.trial
        self._running = True
        try:
            return passes(
                run, kwargs, output, plan=self.plan, share=share, rows=made.kind.rows, device=made.kind.device
            )
        finally:
            self._running = False


def _changed() -> UnsupportedError:
    return UnsupportedError(
        "the denoiser's output changed its shape between two steps whose inputs have the same shapes: "
        "run this pipeline with cfg=1"
    )
