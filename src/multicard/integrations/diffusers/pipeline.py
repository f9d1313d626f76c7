"""Loading a pipeline's folder on every rank: denoisers and text encoders by slices, everything else by diffusers."""

from __future__ import annotations

import math
import pathlib
import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch

from multicard import mesh as meshes
from multicard.config import ParallelConfig
from multicard.errors import CheckpointError, ConfigError, MulticardError, UnsupportedError
from multicard.extras import has
from multicard.integrations.diffusers.folder import PipelineFolder, components, denoisers_of, pairs
from multicard.integrations.diffusers.load import STEM, Outline, outline_denoiser, outline_text, stem_of
from multicard.integrations.diffusers.lora import load_lora, lora_file
from multicard.integrations.diffusers.parallelize import parallelize
from multicard.integrations.diffusers.parts import check_parts
from multicard.integrations.diffusers.reports import held, note_reads
from multicard.integrations.untrusted import blamed_on, offline, read_config
from multicard.mesh import ParallelMesh
from multicard.models.memory import GIB, free_bytes, ranks_here
from multicard.replica import Replica
from multicard.weights import Checkpoint, agree
from multicard.weights.checkpoint import STORED_TYPES, WIDTHS
from multicard.weights.folder import parse_dtype

MOST_TP = 64
"""The largest degree that an error proposes."""


def from_folder(
    path: pathlib.Path,
    mesh: ParallelMesh,
    *,
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    parts: Collection[str] | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The pipeline in a folder, checked and loaded: ``mc.from_pretrained`` of it."""
    wanted = None if parts is None else check_parts(parts)
    folder = PipelineFolder(path, parse_dtype(dtype), variant, trust_remote_code, parts=wanted)
    folder.check(mesh.config)
    return load_pipeline(folder, mesh)


def model_from_folder(
    path: pathlib.Path,
    name: str,
    mesh: ParallelMesh,
    *,
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    plan: Mapping[str, Any] | None = None,
) -> Any:
    """The diffusers model in a folder, split: ``mc.from_pretrained`` of it. With tp it is read by slices.

    Args:
        name: of its class.
    """
    import diffusers

    read_config(path)
    wanted, cls = parse_dtype(dtype), getattr(diffusers, name, None)
    if not isinstance(cls, type) or not issubclass(cls, diffusers.ModelMixin):
        raise CheckpointError(f"{path}/config.json: diffusers {diffusers.__version__} has no model {name!r}")
    outline = None
    if mesh.tp.size > 1 and plan is None:
        outline = outline_denoiser(cls, path, mesh, wanted, variant)
    if outline is not None:
        Replica(mesh).compare("mc.from_pretrained", outline.facts)
        outline.read()
        return parallelize(outline.model.to(mesh.device), mesh)
    given = {} if wanted is None else {"dtype" if _takes_dtype(diffusers) else "torch_dtype": wanted}
    with offline(), blamed_on(f"{path}: diffusers can't load it"):
        model = cls.from_pretrained(str(path), use_safetensors=True, local_files_only=True, variant=variant, **given)
    return parallelize(model.to(mesh.device), mesh, plan)


def load_pipeline(folder: PipelineFolder, mesh: ParallelMesh) -> Any:
    """This rank's pipeline, split over ``mesh``. All-gathers tell every rank whether all could outline it, have loaded
    it, and have loaded the LoRAs.

    Raises:
        CheckpointError: a file is damaged, or diffusers couldn't load it; every rank raises the first one's reason.
        ConfigError: a rank's share doesn't fit in memory; before anything is read.
        UnsupportedError: see :func:`multicard.parallelize`.
    """
    _hide_bars(mesh.rank)
    index, failure, outlines, pipe = folder.index(), None, {}, None
    try:
        with offline(), blamed_on(f"{folder.path}: diffusers can't load it"):
            outlines = _outlines(folder, index, mesh)
        _check_memory(folder, index, mesh, outlines)
    except MulticardError as error:
        failure = error
    agree(failure, mesh.world, mesh.device)
    Replica(mesh).compare("loading a pipeline", {name: outline.facts for name, outline in outlines.items()})
    reads = {name: outline.read().bytes_read for name, outline in outlines.items()}
    try:
        pipe = _from_pretrained(folder, index, {name: outline.model for name, outline in outlines.items()})
    except MulticardError as error:
        failure = error
    agree(failure, mesh.world, mesh.device)
    pipe = parallelize(pipe, mesh, parts=folder.parts)
    note_reads(pipe, {**{name: _stored(folder, name, kind)[0] for name, kind in components(index).items()}, **reads})
    try:
        load_lora(pipe, [lora_file(path) for path in folder.lora])
    except MulticardError as error:
        failure = error
    agree(failure, mesh.world, mesh.device)
    return pipe.to(mesh.device)


def _from_pretrained(folder: PipelineFolder, index: dict[str, Any], loaded: Mapping[str, Any]) -> Any:
    """The pipeline with the components that are ``loaded``, and the others as diffusers loads them."""
    import diffusers

    # components that the index leaves out must be passed as None again
    given: dict[str, Any] = dict.fromkeys(set(pairs(index)) - set(components(index)))
    if folder.dtype is not None:
        given["dtype" if _takes_dtype(diffusers) else "torch_dtype"] = folder.dtype
    with offline(), blamed_on(f"{folder.path}: diffusers can't load it"):
        return diffusers.DiffusionPipeline.from_pretrained(
            str(folder.path),
            use_safetensors=True,
            local_files_only=True,
            variant=folder.variant,
            trust_remote_code=folder.trust_remote_code,
            **given,
            **loaded,
        )


def _outlines(folder: PipelineFolder, index: dict[str, Any], mesh: ParallelMesh) -> dict[str, Outline]:
    """The components of which this rank can read its own slices alone, by name."""
    import diffusers

    parts = check_parts(folder.parts)
    found: dict[str, Outline | None] = {}
    if mesh.tp.size > 1 and "denoiser" in parts:
        for name, cls in denoisers_of(index).items():
            found[name] = outline_denoiser(
                getattr(diffusers, cls), folder.path / name, mesh, folder.dtype, folder.variant
            )
    if mesh.replica.size > 1 and "text" in parts and has("transformers"):
        for name, encoder in _text_encoders(folder, index).items():
            found[name] = outline_text(encoder, folder.path / name, mesh, folder.dtype, folder.variant)
    return {name: outline for name, outline in found.items() if outline is not None}


def _text_encoders(folder: PipelineFolder, index: dict[str, Any]) -> dict[str, type[Any]]:
    """Classes of transformers' own models, by name."""
    import transformers

    named = {
        name: getattr(transformers, cls, None)
        for name, (library, cls) in components(index).items()
        if library == "transformers" and not (folder.path / name / f"{library}.py").exists()
    }
    return {
        name: cls
        for name, cls in named.items()
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    }


def _stored(folder: PipelineFolder, name: str, kind: tuple[str, str]) -> tuple[int, int]:
    """Bytes of a component's weights in its files, and in memory as diffusers loads them."""
    library, _ = kind
    path = folder.path / name
    stem = stem_of(path, "model" if library == "transformers" else STEM, folder.variant)
    if stem is None:
        return 0, 0
    in_files = in_memory = 0
    with Checkpoint(path, stem) as checkpoint:
        for entry in checkpoint.tensors.values():
            count = math.prod(entry.shape)
            width = WIDTHS.get(entry.dtype, 1)
            in_files += count * width
            if entry.dtype in STORED_TYPES:
                width = folder.dtype.itemsize if folder.dtype else width if library == "transformers" else 4
            in_memory += count * width
    return in_files, in_memory


def _needed(folder: PipelineFolder, index: dict[str, Any], outlines: Mapping[str, Outline]) -> int:
    """Bytes of all components on this rank."""
    whole = {name: kind for name, kind in components(index).items() if name not in outlines}
    return sum(held(outline.model) for outline in outlines.values()) + sum(
        _stored(folder, name, kind)[1] for name, kind in whole.items()
    )


def _check_memory(
    folder: PipelineFolder, index: dict[str, Any], mesh: ParallelMesh, outlines: Mapping[str, Outline]
) -> None:
    needed, free = _needed(folder, index, outlines), free_bytes(mesh.device, ranks_here())
    if needed <= free:
        return
    fits = [f"tp={tp}" for tp in _degrees_that_fit(folder, index, mesh)]
    less = "" if folder.dtype is not None and folder.dtype.itemsize == 2 else "; dtype='bfloat16' takes less"
    raise ConfigError(
        f"{folder.path}: a rank's share takes {needed / GIB:.3g} GiB at {mesh.config} and a rank has "
        f"{free / GIB:.3g} GiB free: {' or '.join(fits) or f'no tp up to {MOST_TP}'} would fit{less}"
    )


def _degrees_that_fit(folder: PipelineFolder, index: dict[str, Any], mesh: ParallelMesh) -> list[int]:
    """Multiples of tp, with the other degrees as they are, at which a share fits. CPU ranks share one memory."""
    found, times = [], 2
    while (tp := mesh.tp.size * times) <= MOST_TP:
        other = meshes.outline(ParallelConfig(**{**mesh.config.degrees, "tp": tp}), mesh.device)
        try:
            needed = _needed(folder, index, _outlines(folder, index, other))
        except UnsupportedError:  # more ranks than heads
            break
        if needed <= free_bytes(mesh.device, ranks_here() * times):
            found.append(tp)
        times *= 2
    return found


def _takes_dtype(diffusers: Any) -> bool:
    """``torch_dtype`` is called ``dtype`` since diffusers 0.42."""
    return tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42)


def _hide_bars(rank: int) -> None:
    """Show loading bars only on rank 0's terminal."""
    if rank == 0 and sys.stderr.isatty():
        return
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
