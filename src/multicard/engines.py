"""Which library runs an LLM's checkpoint, and what its ranks load and keep."""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch

from multicard import place
from multicard.config import ParallelConfig
from multicard.errors import CheckpointError, ConfigError, MulticardError, UnsupportedError
from multicard.extras import command, has
from multicard.mesh import ParallelMesh
from multicard.models.compiled import Compilation, why_not
from multicard.models.drafts import Drafting
from multicard.models.load import check_adapters, check_draft, load_decoder, naming_draft
from multicard.models.load import check_folder as check_ours
from multicard.replica import Replica
from multicard.values import is_whole
from multicard.weights import LoadReport, is_gguf
from multicard.weights.folder import folder_path

LOG = logging.getLogger(__name__)
MOST_DRAFTS = 64  # the logits of so many tokens are held at once


@dataclasses.dataclass
class Loaded:
    """What a rank keeps. All ranks are given the same requests, also those of different replicas.

    Attributes:
        reports: of the model, and of the draft model if there is one.
    """

    model: Any
    reports: list[LoadReport]
    replicas: Replica
    compilation: Compilation | None = None
    drafting: Drafting | None = None


def check(
    path: pathlib.Path,
    degrees: ParallelConfig,
    compile: Any,
    draft: pathlib.Path | str | None,
    draft_tokens: Any,
    adapters: Sequence[pathlib.Path] = (),
) -> tuple[Any, str]:
    """The decoder's config, and which library runs it. Raises as :class:`~multicard.llm.LLM` before a rank starts."""
    if not isinstance(compile, bool) and compile != "auto":
        raise ConfigError(f"compile={compile!r}: must be True, False or 'auto'")
    if not is_whole(draft_tokens, least=1, most=MOST_DRAFTS):
        raise ConfigError(f"draft_tokens={draft_tokens!r}: a whole number from 1 to {MOST_DRAFTS}")
    config, engine = _check_folder(path, degrees)
    if compile is True and engine != "multicard":
        raise UnsupportedError(f"compile=True: {engine} runs this model; only our own decoder is compiled")
    if draft is not None and engine != "multicard":
        raise UnsupportedError(f"draft={str(draft)!r}: {engine} runs this model; only our own decoder takes drafts")
    if adapters and engine != "multicard":
        raise UnsupportedError(
            f"lora={str(adapters[0])!r}: {engine} runs this model; only our own decoder takes adapters here: load the "
            "model and its adapters with transformers and peft, and pass it to mc.parallelize"
        )
    if isinstance(draft, pathlib.Path):
        check_draft(draft, degrees, config)
    if adapters:
        check_adapters(path, config, adapters)
    return config, engine


def parse_draft(draft: Any) -> pathlib.Path | str | None:
    """``draft``, a checkpoint's as an absolute path. Raises ConfigError for what can't be one."""
    if draft is None or draft == "prompt":
        return draft
    if not isinstance(draft, str | os.PathLike):
        raise ConfigError(f"draft={draft!r}: must be None, 'prompt' or a checkpoint's folder")
    return folder_path(draft)


def _check_folder(path: pathlib.Path, degrees: ParallelConfig) -> tuple[Any, str]:
    """The decoder's config, and which library runs it: transformers runs architectures that our decoder lacks."""
    try:
        return check_ours(path, degrees), "multicard"
    except UnsupportedError as refusal:
        if is_gguf(path):
            raise
        if not has("transformers"):
            raise UnsupportedError(f"{refusal}; or {command('transformers')}: LLM uses it for other models") from None
        try:
            return _check_with_transformers(path, degrees), "transformers"
        except CheckpointError as other:
            raise CheckpointError(f"{refusal}; {other}") from None
        except MulticardError as other:
            raise other from refusal


def _check_with_transformers(path: pathlib.Path, degrees: ParallelConfig) -> Any:
    """The config of a model that transformers runs. Its warnings are hidden: if it fails, the error says why."""
    from transformers.utils import logging

    from multicard.integrations.transformers.llm import check_folder as check_transformers

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        return check_transformers(path, degrees)
    finally:
        logging.set_verbosity(verbosity)


def load(
    mesh: ParallelMesh,
    engine: str,
    path: str,
    dtype: torch.dtype | None,
    verify: bool,
    compile: bool | str,
    draft: pathlib.Path | str | None,
    draft_tokens: int,
    adapters: Sequence[pathlib.Path] = (),
) -> Generator[float, None, Loaded]:
    """This rank's part of the checkpoint, with adapters added, and of the draft model's. Yields the fraction done."""
    replicas = Replica(mesh, whole_mesh=True)
    drafts = "a model" if isinstance(draft, pathlib.Path) else draft  # hosts may have it in different folders
    asked = {"engine": engine, "dtype": dtype, "verify": verify, "compile": compile}
    replicas.compare("loading an LLM", {**asked, "draft": drafts, "draft_tokens": draft_tokens, "lora": len(adapters)})
    if engine == "transformers":
        from multicard.integrations.transformers.llm import load_decoder as load_with_transformers

        model, report = yield from _last(load_with_transformers(mesh, path, dtype, verify))
        return Loaded(model, [report], replicas)
    compiles = _compiles(mesh, compile)

    def ours(
        folder: str, begin: float, end: float, drafts: bool, added: Sequence[pathlib.Path] = ()
    ) -> Generator[float, None, tuple[Any, LoadReport, Any]]:
        steps = load_decoder(mesh, folder, dtype, verify, reorder=not compiles, adapters=added)
        model, report = yield from _last(steps, begin, end)
        return model, report, Compilation(model, folder, compile is True, drafts) if compiles else None

    if not isinstance(draft, pathlib.Path):
        model, report, compilation = yield from ours(path, 0.0, 1.0, draft is not None, adapters)
        return Loaded(model, [report], replicas, compilation, Drafting(draft_tokens) if draft else None)
    model, report, compilation = yield from ours(path, 0.0, 0.5, True, adapters)
    with naming_draft(draft):
        other, draft_report, of_draft = yield from ours(str(draft), 0.5, 1.0, False)
    return Loaded(model, [report, draft_report], replicas, compilation, Drafting(draft_tokens, other, of_draft))


def _last(steps: Iterator[Any], begin: float = 0.0, end: float = 1.0) -> Generator[float, None, Any]:
    """A loader's model and report, which it yields last; the fractions before them go from ``begin`` to ``end``."""
    for step in steps:
        if isinstance(step, float):
            yield begin + (end - begin) * step
    return step


def _compiles(mesh: ParallelMesh, compile: bool | str) -> bool:
    """Whether this rank compiles; where it can't, ``compile=True`` raises, and "auto" says so on the first rank."""
    if compile is False or (compile == "auto" and not place.compiling()):
        return False
    obstacle = why_not(mesh.device)
    if obstacle and compile is True:
        raise ConfigError(f"compile=True: {obstacle}")
    if obstacle and mesh.rank == 0:
        LOG.warning("decoding stays uncompiled, which gives the same tokens but slower: %s", obstacle)
    return obstacle is None
