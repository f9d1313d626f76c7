"""``DiffusionPipeline``: a diffusers pipeline on several ranks behind one object."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch

from multicard.config import ParallelConfig
from multicard.errors import ConfigError
from multicard.integrations.diffusers.folder import PipelineFolder
from multicard.integrations.diffusers.output import join, pack, unpack
from multicard.integrations.diffusers.parts import check_parts
from multicard.integrations.diffusers.pipeline import load_pipeline
from multicard.integrations.diffusers.replicas import Batch
from multicard.integrations.diffusers.reports import ComponentReport, report
from multicard.integrations.diffusers.request import check_request
from multicard.mesh import ParallelMesh
from multicard.progress import loading_bar, steps_bar, steps_shown
from multicard.ranks.settings import Options
from multicard.replica import Replica
from multicard.session import Session
from multicard.values import did_you_mean, is_whole
from multicard.weights.folder import folder_path, parse_dtype, paths_of

OURS = {
    "generator": "seed= gives every rank the same one",
    "return_dict": "the output's fields are attributes",
}
"""Pipeline arguments that DiffusionPipeline sets itself, and what to use instead."""


class DiffusionOutput(types.SimpleNamespace):
    """A pipeline's output: its fields (``images``, ``frames``, ...) as attributes, on the CPU."""


class DiffusionPipeline(Session):
    """Any diffusers pipeline folder on several ranks; a context manager.

    Each rank loads its part of the pipeline, as :func:`multicard.parallelize` splits it; ``load_reports`` says, by rank
    and component, what it has read and holds. Requests, failures, restarts and jobs: see
    :class:`~multicard.session.Session`.

    Args:
        path: a folder with model_index.json and safetensors weights.
        cfg: ranks over guidance branches.
        ring, ulysses: ranks that share image tokens.
        tp: ranks that share every layer of the denoiser.
        dp: replicas, over which a list of prompts is divided.
        dtype: "auto" (as diffusers loads it), "float32", "bfloat16", "float16".
        variant: the part of the weight files' names that selects one of several sets, for example "fp16".
        trust_remote_code: whether Python files in the folder may run; as in diffusers.
        lora: a LoRA's safetensors file, or a folder with one; or several of these. All are loaded by diffusers, with
            full weight.
        parts: the parts to split, of "denoiser", "text" and "vae"; None: all that can be.
        progress: show each request's steps on standard error; None: only on a terminal.
        options: how ranks are started, as for :func:`multicard.launch`.

    Raises:
        ConfigError, UnsupportedError, CheckpointError: before a rank starts, if the folder and the degrees show it;
            ConfigError if a rank's share doesn't fit in memory, naming degrees at which it would.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        cfg: int = 1,
        ring: int = 1,
        ulysses: int = 1,
        tp: int = 1,
        dp: int = 1,
        dtype: str | torch.dtype = "auto",
        variant: str | None = None,
        trust_remote_code: bool = False,
        lora: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
        parts: Sequence[str] | None = None,
        progress: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        degrees = ParallelConfig(cfg=cfg, ring=ring, ulysses=ulysses, tp=tp, dp=dp)
        self.path = folder_path(path)
        self._progress = sys.stderr.isatty() if progress is None else progress
        self.lora = paths_of("lora", lora)
        given = None if parts is None else check_parts(parts)
        folder = PipelineFolder(self.path, parse_dtype(dtype), variant, trust_remote_code, self.lora, given)
        folder.check(degrees)
        bar = functools.partial(loading_bar, False, "")  # diffusers shows its own, on rank 0
        super().__init__(degrees, options, _load, folder, bar=bar)

    def _after_loading(self) -> None:
        self._parameters: list[str] = self._run(_parameters)[0]
        by_rank = self._run(_report)
        self.load_reports = [{name: ComponentReport(**each) for name, each in found.items()} for found in by_rank]

    def __call__(self, *args: Any, seed: int = 0, **kwargs: Any) -> DiffusionOutput:
        """Run the pipeline with its own arguments, except that ``seed`` replaces a generator.

        Args:
            args, kwargs: the pipeline's. A list of prompts is divided over the replicas of dp; the pictures are the
                same as with dp=1. Functions (``callback_on_step_end``) are copied to every rank and run there: their
                return values and changes to the pipeline take effect, only rank 0 prints, and the caller's variables
                don't change.
            seed: the noise is that of ``generator=torch.Generator().manual_seed(seed)`` in one process, at any degrees.

        Returns:
            the output's fields, on the CPU, from rank 0 (with dp, from each replica's first rank).

        Raises:
            ConfigError: an argument that the pipeline doesn't have, an invalid seed, no steps or no pixels.
            UnsupportedError: with dp, a list of prompts for a pipeline whose noise can't be divided over replicas.
            the pipeline's own exception for values that it refuses, or a callback's; the ranks stay in use.
        """
        ranks = self._living()
        arguments = self._named(args, kwargs)
        check_request(arguments)
        if not is_whole(seed, 0, (1 << 63) - 1):
            raise ConfigError(f"seed={seed!r}: a whole number from 0 to 2^63-1, the same on every rank")
        with steps_bar(self._progress and bool(ranks.pids)) as bar:
            outputs = ranks.run(_generate, self._loaded, arguments, seed, bar or self._progress)
        return DiffusionOutput(**join([unpack(output) for output in outputs if output is not None]))

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the arguments that a request may have besides ``seed``, in the pipeline's order."""
        return tuple(name for name in self._parameters if name not in OURS)

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        names = self.parameters
        if len(args) > len(names):
            raise ConfigError(f"{len(args)} arguments: the pipeline takes at most {len(names)}: {', '.join(names)}")
        named = dict(zip(names, args, strict=False))
        for name in kwargs:
            if name in OURS:
                raise ConfigError(f"{name}: not accepted here; {OURS[name]}")
            if name not in names:
                hint = did_you_mean(name, names) or f": it takes {', '.join(names)}"
                raise ConfigError(f"the pipeline has no argument {name!r}{hint}")
            if name in named:
                raise ConfigError(f"{name} is given twice: by position and by keyword")
        return named | dict(kwargs)


def _load(mesh: ParallelMesh, folder: PipelineFolder) -> Any:
    return load_pipeline(folder, mesh)


def _report(mesh: ParallelMesh, pipe: Any) -> dict[str, dict[str, Any]]:
    return {name: dataclasses.asdict(each) for name, each in report(pipe).items()}


def _parameters(mesh: ParallelMesh, pipe: Any) -> list[str]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(type(pipe).__call__).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind not in kinds][1:]


def _generate(
    mesh: ParallelMesh, pipe: Any, arguments: Mapping[str, Any], seed: int, bar: str | bool
) -> dict[str, Any] | None:
    """This replica's share of a request; its output from the replica's first rank, None from others."""
    Replica(mesh, whole_mesh=True).compare("a call of DiffusionPipeline", {**arguments, "seed": seed})
    batch = Batch(arguments, mesh.dp.size)
    mine = batch.arguments(mesh.dp.rank)
    if mine is None:
        return None
    mine = {name: value.to(mesh.device) if isinstance(value, torch.Tensor) else value for name, value in mine.items()}
    if "generator" in _parameters(mesh, pipe):
        mine["generator"] = torch.Generator().manual_seed(seed)
    devices = [] if mesh.device.type == "cpu" else [mesh.device]
    kind = {} if mesh.device.type == "cpu" else {"device_type": mesh.device.type}
    with steps_shown(pipe, mesh, bar), torch.random.fork_rng(devices, **kind):
        torch.manual_seed(seed)
        with torch.no_grad(), batch.noise(mesh.dp.rank):
            output = pipe(**mine)
    first = mesh.rank == mesh.dp.rank * (mesh.world_size // mesh.dp.size)
    return pack(output) if first else None
