"""Doors of a diffusers pipeline: its call, its denoisers' and its schedulers' ``step``, intercepted in place.

At each door the ranks of a replica compare their inputs, so that none works on another picture. The denoisers' doors
lead to guidance, which divides the calls over ranks, and to the proof that a split sequence was split.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from multicard.guidance import BatchPlan, Branches, unwrap
from multicard.integrations.calls import named, parameters
from multicard.integrations.diffusers.caches import Caches
from multicard.integrations.diffusers.checks import check_guidance, check_maps
from multicard.integrations.diffusers.denoisers import HookedDenoiser, denoisers, uncompiled
from multicard.integrations.diffusers.sequence import split_of
from multicard.integrations.diffusers.tensor import tensor_hooks
from multicard.integrations.intercept import DOOR, PLAIN, Plain, intercept
from multicard.integrations.seams import RowProof, bypassed
from multicard.mesh import ParallelMesh
from multicard.replica import Replica


class Door:
    """A denoiser's door: comparison of inputs, guidance, proofs."""

    def __init__(self, mesh: ParallelMesh, batch: BatchPlan, *, step_per_call: bool) -> None:
        self.mesh, self.batch = mesh, batch
        self.replica = Replica(mesh)
        self.branches = Branches(mesh.cfg, batch, step_per_call=step_per_call) if mesh.cfg.size > 1 else None
        self._denoisers: dict[nn.Module, HookedDenoiser] = {}
        self._inside = False

    def __deepcopy__(self, memo: Any) -> Door:
        return self  # pipelines copy their schedulers; a copy's steps count as the original's

    def place(self, name: str, module: nn.Module) -> None:
        """Intercept ``module`` from now on."""
        inner = uncompiled(module)
        split = split_of(inner)
        denoiser = self._denoisers.get(module)
        caches = denoiser.caches if denoiser else Caches(name, inner, self.mesh)
        caches.adopt()
        intercept(module, "__call__", self, "denoise")
        if denoiser is None:
            proof, hooks = RowProof("diffusers", inner), tensor_hooks(inner)

            @contextlib.contextmanager
            def around() -> Any:
                if hooks is not None:
                    hooks.check()
                with proof(name), split.proved() if split else contextlib.nullcontext():
                    yield

            self._denoisers[module] = HookedDenoiser(name, module, caches, around)

    def denoise(self, module: nn.Module, plain: Plain, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The denoiser's ``__call__``."""
        denoiser = self._denoisers.get(module)
        if denoiser is None or self._inside:  # a copy, or a denoiser inside a denoiser
            return plain(*args, **kwargs)
        given = unwrap(denoiser.bind(args, kwargs))
        compared = {**given, "its weights": _dtype(module), **denoiser.adapters.facts()}
        self.replica.compare(f"a call of {denoiser.name}", compared)
        self._inside = True
        try:
            return self.share(denoiser, given)
        finally:
            self._inside = False

    def traced(self, module: nn.Module) -> None:
        """The denoiser's ``__call__`` is being compiled, inside this door or around it, where guidance isn't divided.

        Raises:
            UnsupportedError: around it.
        """
        if self.branches is not None and not self._inside:
            from multicard.integrations.uncompiled import GUIDANCE, refuse

            refuse(type(module).__name__, GUIDANCE)

    def share(self, denoiser: HookedDenoiser, given: Mapping[str, Any]) -> Any:
        """Run this rank's part of the call."""
        denoiser.caches.follow()
        if self.branches is None:
            return denoiser.run(given)
        denoiser.caches.once()
        return self.branches.call(denoiser, given)

    def start_step(self) -> None:
        """The calls from now on are of another step."""
        for denoiser in self._denoisers.values():
            denoiser.caches.start_step()


class PipelineDoor(Door):
    """The doors of one pipeline."""

    def __init__(self, mesh: ParallelMesh, batch: BatchPlan) -> None:
        super().__init__(mesh, batch, step_per_call=False)
        self._running = False
        self._calls = self._steps = 0

    def attach(self, pipe: Any) -> None:
        """Intercept the current components of ``pipe``; some may have been replaced since the last call.

        Raises:
            UnsupportedError: there is no denoiser, one has a cache that keeps state from step to step, guidance is
                inside the attention of a split sequence, or attention maps of split heads are read.
        """
        if self.mesh.sequence.size > 1:
            check_guidance(pipe)
        if self.mesh.tp.size > 1:
            check_maps(pipe)
        for name, module in denoisers(pipe).items():
            self.place(name, module)
        for component in pipe.components.values():
            if hasattr(component, "step") and hasattr(component, "set_timesteps"):
                intercept(component, "step", self, "step")

    def share(self, denoiser: HookedDenoiser, given: Mapping[str, Any]) -> Any:
        if not self._running:  # a component of the pipeline is called directly
            self.place(denoiser.name, denoiser.module)
            return denoiser.run(given)
        self._calls += 1
        return super().share(denoiser, given)

    def step(self, scheduler: Any, plain: Plain, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A scheduler's ``step``: all branches of this step have been called."""
        if not self._running:
            return plain(*args, **kwargs)
        self._steps += 1
        drifted = self.branches.end_step() if self.branches else False
        self.start_step()
        args, kwargs = unwrap((args, dict(kwargs)))
        if drifted:
            args, kwargs = self.replica.same_numbers((args, kwargs))
        self.replica.compare(f"{type(scheduler).__name__}.step", named(parameters(type(scheduler).step), args, kwargs))
        return plain(*args, **kwargs)

    def run(self, pipe: Any, plain: Plain, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The pipeline's own ``__call__``."""
        if self._running:
            return plain(*args, **kwargs)
        self.attach(pipe)
        name = type(pipe).__name__
        given = named(parameters(type(pipe).__call__), args, kwargs)
        self.replica.compare(f"a call of {name}", {**given, **_components(pipe)})
        self.replica.same_noise()
        self._running, failed = True, True
        self._calls = self._steps = 0
        self.start_step()
        try:
            output = plain(*args, **kwargs)
            failed = False
        finally:
            self._running = False
            if self.branches:
                self.branches.finish(failed)
        if (self._calls == 0) != (self._steps == 0):
            raise bypassed("diffusers", f"{name} made {self._steps} scheduler steps and {self._calls} denoiser calls")
        return unwrap(output)


def open_pipeline(pipe: Any, mesh: ParallelMesh, batch: BatchPlan) -> None:
    """Put doors on every later call of ``pipe``, and of pipelines made from its components."""
    door = PipelineDoor(mesh, batch)
    door.attach(pipe)
    intercept(pipe, "__call__", door, "run")
    _hand_on()


def open_model(module: nn.Module, mesh: ParallelMesh, batch: BatchPlan) -> None:
    """Put a door on every later call of a denoiser without a pipeline: with cfg, each call's batch is split."""
    ModelDoor(mesh, batch).place(type(module).__name__, module)


class ModelDoor(Door):
    """The door of a denoiser without a pipeline; every call is a step."""

    def __init__(self, mesh: ParallelMesh, batch: BatchPlan) -> None:
        super().__init__(mesh, batch, step_per_call=True)

    def share(self, denoiser: HookedDenoiser, given: Mapping[str, Any]) -> Any:
        self.place(denoiser.name, denoiser.module)
        self.start_step()
        try:
            return super().share(denoiser, given)
        finally:
            if self.branches:
                self.branches.finish(failed=True)


def _components(pipe: Any) -> dict[str, Any]:
    """The parts of a pipeline in which ranks could differ without an error."""
    return {f"component {name}": _component(component) for name, component in pipe.components.items()}


def _component(component: Any) -> Any:
    if isinstance(component, nn.Module):
        return [type(uncompiled(component)).__name__, _dtype(component)]
    if hasattr(component, "set_timesteps"):
        config = getattr(component, "config", {})
        return [type(component).__name__, {key: config[key] for key in config if not key.startswith("_")}]
    return type(component).__name__


def _dtype(module: nn.Module) -> torch.dtype | None:
    first = next(module.parameters(), None)
    return None if first is None else first.dtype


def _hand_on() -> None:
    """Give a pipeline that is made from a split one's components (``from_pipe``) a door too."""
    import diffusers

    pipelines: Any = diffusers.DiffusionPipeline
    method = pipelines.register_modules
    if hasattr(method, PLAIN):
        return

    @functools.wraps(method)
    def register(pipe: Any, **components: Any) -> None:
        method(pipe, **components)
        doors = (vars(component).get(DOOR) for component in components.values() if hasattr(component, "__dict__"))
        door = next((door for door in doors if isinstance(door, PipelineDoor)), None)
        if door is not None:
            intercept(pipe, "__call__", PipelineDoor(door.mesh, door.batch), "run")

    setattr(register, PLAIN, method)
    pipelines.register_modules = register
