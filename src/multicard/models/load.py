"""Loading a decoder from a checkpoint, a folder or a GGUF file, and the checks before it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Iterator, Sequence

import torch

from multicard.axis import Axis
from multicard.config import ParallelConfig
from multicard.errors import CheckpointError, ConfigError, MulticardError, UnsupportedError
from multicard.layers import rows
from multicard.layers.head import ParallelLMHead
from multicard.layers.linear import ColumnParallelLinear, RowParallelLinear
from multicard.layers.packed import pack, pack_tied
from multicard.mesh import ParallelMesh, single
from multicard.models import lora
from multicard.models.config import DecoderConfig
from multicard.models.decoder import ParallelTransformer
from multicard.models.memory import GIB, free_bytes, ranks_here
from multicard.models.outline import declare, describe, is_ignored, outline, rounding, sources
from multicard.quantized.weight import blocks_of
from multicard.weights import Checkpoint, LoadReport, SourceOf, TensorFiles, agree, check, is_gguf, load, open_files

LOG = logging.getLogger(__name__)
MULTIPLYING = (ColumnParallelLinear, RowParallelLinear, ParallelLMHead)


def check_folder(path: str | os.PathLike[str], degrees: ParallelConfig) -> DecoderConfig:
    """Refuse a checkpoint, as far as that is possible without starting a rank.

    Raises:
        CheckpointError: a file that is missing, truncated, damaged, or doesn't fit the config.
        UnsupportedError: a feature that the decoder lacks.
        ConfigError: degrees that don't fit the model.
    """
    config = describe(path)
    model = outline(config, degrees)
    with contextlib.closing(open_files(path)) as files:
        check(model, files, sources(config, files), functools.partial(is_ignored, config, files=files))
    return config


def check_adapters(path: str | os.PathLike[str], config: DecoderConfig, folders: Sequence[os.PathLike[str]]) -> None:
    """Refuse LoRA adapters that can't be added to the checkpoint at ``path``. Raises as :func:`lora.adapters`."""
    if not folders:
        return
    if is_gguf(path) or config.scheme is not None:
        held = "is a GGUF file" if is_gguf(path) else "holds quantised weights"
        raise UnsupportedError(f"lora={os.fspath(folders[0])!r}: {path} {held}; adapters are for folders of numbers")
    with lora.adapters(folders) as found, Checkpoint(path) as checkpoint:
        matrices = {name for name, entry in checkpoint.tensors.items() if len(entry.shape) == 2}
        # An embedding's adapter is another product, and a tied head is the embedding.
        matrices -= {"model.embed_tokens.weight", *(["lm_head.weight"] if config.tied_head else [])}
        for adapter in found:
            adapter.check(checkpoint, matrices)


def check_draft(folder: str | os.PathLike[str], degrees: ParallelConfig, config: DecoderConfig) -> None:
    """Refuse a checkpoint that can't draft for the model of ``config``. Raises as :func:`check_folder`."""
    with naming_draft(folder):
        draft = check_folder(folder, degrees)
        if draft.vocab_size != config.vocab_size:
            raise ConfigError(
                f"a vocabulary of {draft.vocab_size} tokens, and the model's has {config.vocab_size}: a draft model "
                "needs the same tokens"
            )


@contextlib.contextmanager
def naming_draft(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Errors about a checkpoint say that it is the draft."""
    try:
        yield
    except (CheckpointError, ConfigError, UnsupportedError) as error:
        raise type(error)(f"draft={os.fspath(folder)!r}: {error}") from None


def load_decoder(
    mesh: ParallelMesh,
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    checksums: bool = False,
    reorder: bool = True,
    adapters: Sequence[os.PathLike[str]] = (),
    quantize: str | None = None,
) -> Iterator[float | tuple[ParallelTransformer, LoadReport]]:
    """This rank's part of the decoder at ``path``. Yields the fraction done, then the model and the report.

    Every rank yields equally often.

    Args:
        dtype: None: the checkpoint's.
        checksums: first compare the files with the folder's SHA256SUMS; the files are divided over the ranks.
        reorder: on the CPU, reorder weights for its matrix kernel as they are read; compiled steps can't read those.
        adapters: folders of LoRA adapters that are added to the weights.
        quantize: how weights are then rounded, a key of ``outline.QUANTIZE``; not for GGUF files.

    Raises:
        CheckpointError, ConfigError: the same on every rank; ConfigError if a shard doesn't fit in memory.
    """
    failure = None
    try:
        model = declare(path, mesh, dtype, quantize)
        config = model.config
        check_adapters(path, config, adapters)
        _check_memory(path, mesh, model)
    except MulticardError as error:  # perhaps on one rank only: a file changed, or memory differs
        failure = error
    agree(failure, mesh.world, mesh.device)
    with lora.adapters(adapters) as added:
        for done in load(
            model,
            path,
            mesh.world,
            mesh.device,
            lambda files: _sources(files, model, added),
            ignored=functools.partial(is_ignored, config),
            checksums=checksums,
            finish=functools.partial(_reorder, model) if reorder else _in_row_order,
        ):
            if isinstance(done, LoadReport) and done.dequantized_bytes and mesh.rank == 0:
                words = (done.dequantized_bytes / GIB, model.dtype, done.shard_bytes / GIB)
                LOG.info("%s: a rank's weights take %.3g GiB as %s, and %.3g GiB quantised, in the file", path, *words)
            yield (model, done) if isinstance(done, LoadReport) else done


def _sources(files: TensorFiles, model: ParallelTransformer, adapters: Sequence[lora.Adapter]) -> SourceOf:
    """Of all parameters: what the files have, with adapters added, and then rounded."""
    if model.config.quantize is None:
        return lora.adapted(sources(model.config, files, model), adapters)
    return rounding(lora.adapted(sources(model.config, files), adapters), model)


def _reorder(model: ParallelTransformer, module: torch.nn.Module) -> int:
    """Reorder a module's weight for the CPU, a tied head's with the embedding's. Returns the bytes held twice."""
    if module is model.lm_head and model.lm_head.weight is model.embed_tokens.weight:
        size = model.lm_head.weight.nbytes
        return size if pack_tied(model.embed_tokens, model.lm_head) else 0
    pack(module)
    return 0


def _in_row_order(module: torch.nn.Module) -> int:
    if isinstance(module, MULTIPLYING) and module.weight.device.type == "cpu" and not blocks_of(module.weight):
        module.multiply = rows.multiply
    return 0


def parameter_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters, shared ones counted once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _check_memory(path: str | os.PathLike[str], mesh: ParallelMesh, model: ParallelTransformer) -> None:
    ranks, needed = ranks_here(), parameter_bytes(model)
    free = free_bytes(mesh.device, ranks)
    if needed <= free:
        return
    fits = _degree_that_fits(path, mesh, model, ranks)
    advice = f"tp={fits} would fit" if fits else f"no degree up to tp={model.config.heads} would fit here"
    half = (
        "" if model.dtype.itemsize == 2 or any(map(blocks_of, model.parameters())) else "; dtype='bfloat16' takes half"
    )
    raise ConfigError(
        f"a shard takes {needed / GIB:.3g} GiB at tp={mesh.tp.size} and a rank has {free / GIB:.3g} GiB free: "
        f"{advice}{half}"
    )


def _degree_that_fits(
    path: str | os.PathLike[str], mesh: ParallelMesh, model: ParallelTransformer, ranks: int
) -> int | None:
    """The lowest degree at which a shard fits. On the CPU more ranks share the same memory."""
    for tp in range(mesh.tp.size + 1, model.config.heads + 1):
        other = dataclasses.replace(single(), tp=Axis("tp", 0, tp))
        needed = parameter_bytes(declare(path, other, model.dtype, model.config.quantize))
        if needed <= free_bytes(mesh.device, ranks * tp // mesh.tp.size):
            return tp
    return None
