"""Which library runs an LLM's checkpoint, and what its ranks load and keep."""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
from collections.abc import Generator, Iterator
from typing import Any

import torch

from multicard import place
from multicard.config import ParallelConfig
from multicard.errors import CheckpointError, ConfigError, MulticardError, UnsupportedError
from multicard.extras import command, has
from multicard.mesh import ParallelMesh
from multicard.models.compiled import Compilation, why_not
from multicard.models.config import DecoderConfig, is_quantised
from multicard.models.drafts import Drafting
from multicard.models.load import check_adapters, check_draft, load_decoder, naming_draft
from multicard.models.load import check_folder as check_ours
from multicard.models.outline import QUANTIZE
from multicard.replica import Replica
from multicard.values import is_whole
from multicard.weights import LoadReport, checkpoint_path, is_gguf

LOG = logging.getLogger(__name__)
MOST_DRAFTS = 64  # the logits of so many tokens are held at once


@dataclasses.dataclass(frozen=True)
class Loading:
    """How an LLM's checkpoint is loaded and run: the arguments of :class:`~multicard.llm.LLM`, as it says."""

    dtype: torch.dtype | None
    verify: bool
    compile: Any
    draft: pathlib.Path | str | None
    draft_tokens: Any
    lora: tuple[pathlib.Path, ...] = ()
    quantize: Any = None

    def check(self, path: pathlib.Path) -> None:
        """Raise ConfigError for a value that can't be, UnsupportedError for one that ``path`` can't be loaded with."""
        if not isinstance(self.compile, bool) and self.compile != "auto":
            raise ConfigError(f"compile={self.compile!r}: must be True, False or 'auto'")
        if not is_whole(self.draft_tokens, least=1, most=MOST_DRAFTS):
            raise ConfigError(f"draft_tokens={self.draft_tokens!r}: a whole number from 1 to {MOST_DRAFTS}")
        if self.quantize is not None and (not isinstance(self.quantize, str) or self.quantize not in QUANTIZE):
            raise ConfigError(f"quantize={self.quantize!r}: must be None, {' or '.join(map(repr, QUANTIZE))}")
        if self.quantize is not None and is_gguf(path):
            raise UnsupportedError(f"quantize={self.quantize!r}: {path} is a GGUF file; its weights stay as they are")

    def check_ours(self, path: pathlib.Path, config: DecoderConfig) -> None:
        """Raise UnsupportedError for what our own decoder can't do with the checkpoint at ``path``."""
        if self.quantize is not None and config.scheme is not None:
            raise UnsupportedError(
                f"quantize={self.quantize!r}: {path} holds quantised weights ({config.scheme.name}), which stay as "
                "they are"
            )

    def check_other(self, engine: str) -> None:
        """Raise UnsupportedError for what only our own decoder can do."""
        ours = {
            "compile=True": (self.compile is True, "is compiled"),
            f"draft={str(self.draft)!r}": (self.draft is not None, "takes drafts"),
            f"quantize={self.quantize!r}": (self.quantize is not None, "is quantised"),
        }
        for value, (given, does) in ours.items():
            if given:
                raise UnsupportedError(f"{value}: {engine} runs this model; only our own decoder {does}")
        if self.lora:
            raise UnsupportedError(
                f"lora={str(self.lora[0])!r}: {engine} runs this model; only our own decoder takes adapters here: load "
                "the model and its adapters with transformers and peft, and pass it to mc.parallelize"
            )

    def compared(self) -> dict[str, Any]:
        """What ranks must agree on; hosts may have files in different folders."""
        draft = "a model" if isinstance(self.draft, pathlib.Path) else self.draft
        return {**vars(self), "draft": draft, "lora": len(self.lora)}


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


def check(path: pathlib.Path, degrees: ParallelConfig, loading: Loading) -> tuple[Any, str]:
    """The decoder's config, and which library runs it. Raises as :class:`~multicard.llm.LLM` before a rank starts."""
    loading.check(path)
    config, engine = _check_folder(path, degrees)
    if engine != "multicard":
        loading.check_other(engine)
    else:
        loading.check_ours(path, config)
    if isinstance(loading.draft, pathlib.Path):
        check_draft(loading.draft, degrees, config)
    check_adapters(path, config, loading.lora)
    return config, engine


def parse_draft(draft: Any) -> pathlib.Path | str | None:
    """``draft``, a checkpoint's as an absolute path. Raises ConfigError for what can't be one."""
    if draft is None or draft == "prompt":
        return draft
    if not isinstance(draft, str | os.PathLike):
        raise ConfigError(f"draft={draft!r}: must be None, 'prompt' or a checkpoint's folder")
    return checkpoint_path(draft)


def _check_folder(path: pathlib.Path, degrees: ParallelConfig) -> tuple[Any, str]:
    """The decoder's config, and which library runs it: transformers runs architectures that our decoder lacks.

    Quantised weights are read by ours alone, so why it can't is the reason.
    """
    try:
        return check_ours(path, degrees), "multicard"
    except UnsupportedError as refusal:
        if is_gguf(path) or is_quantised(path):
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


def load(mesh: ParallelMesh, engine: str, path: str, loading: Loading) -> Generator[float, None, Loaded]:
    """This rank's part of the checkpoint, with adapters added, and of the draft model's. Yields the fraction done."""
    replicas = Replica(mesh, whole_mesh=True)
    replicas.compare("loading an LLM", {"engine": engine, **loading.compared()})
    if engine == "transformers":
        from multicard.integrations.transformers.llm import load_decoder as load_with_transformers

        model, report = yield from _last(load_with_transformers(mesh, path, loading.dtype, loading.verify))
        return Loaded(model, [report], replicas)
    compiles, draft, tokens = _compiles(mesh, loading.compile), loading.draft, loading.draft_tokens

    def ours(
        path: str, begin: float, end: float, drafts: bool, *changes: Any
    ) -> Generator[float, None, tuple[Any, LoadReport, Any]]:
        steps = load_decoder(mesh, path, loading.dtype, loading.verify, not compiles, *changes)
        model, report = yield from _last(steps, begin, end)
        return model, report, Compilation(model, path, loading.compile is True, drafts) if compiles else None

    alone = not isinstance(draft, pathlib.Path)
    model, report, compilation = yield from ours(
        path, 0.0, 1.0 if alone else 0.5, draft is not None, loading.lora, loading.quantize
    )
    if not isinstance(draft, pathlib.Path):
        return Loaded(model, [report], replicas, compilation, Drafting(tokens) if draft else None)
    with naming_draft(draft):
        other, draft_report, of_draft = yield from ours(str(draft), 0.5, 1.0, False)
    return Loaded(model, [report, draft_report], replicas, compilation, Drafting(tokens, other, of_draft))


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
