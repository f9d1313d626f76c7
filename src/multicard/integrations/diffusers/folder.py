"""The folder of a diffusers pipeline, and the checks before it is loaded."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from typing import Any

import torch

from multicard.axis import Axis
from multicard.config import ParallelConfig
from multicard.errors import CheckpointError, UnsupportedError
from multicard.extras import need
from multicard.integrations.diffusers.checks import check_sequence
from multicard.integrations.diffusers.denoisers import NAMES
from multicard.integrations.diffusers.lora import lora_file
from multicard.integrations.diffusers.parts import check_parts
from multicard.integrations.diffusers.plans import sequence_plan
from multicard.integrations.diffusers.rows import has_rows
from multicard.integrations.diffusers.tensor import tensor_changes
from multicard.integrations.untrusted import blamed_on, offline, read_config
from multicard.values import did_you_mean
from multicard.weights.checkpoint import read_header
from multicard.weights.folder import read_json

INDEX = "model_index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
VARIANT = re.compile(r"[^.]+\.(.+?)(-\d+-of-\d+)?\.safetensors")
LIBRARIES = ("diffusers", "transformers")
WITHOUT_WEIGHTS = ("Scheduler", "Tokenizer", "Processor", "Extractor")


@dataclasses.dataclass(frozen=True)
class PipelineFolder:
    """A pipeline folder, and how to load it.

    Attributes:
        path: absolute.
        dtype: of all weights; None: the one in which diffusers loads the files.
        variant: which of several sets of weight files to load, for example "fp16".
        trust_remote_code: whether Python files in the folder may run.
        lora: files or folders of LoRAs to load into the pipeline.
        parts: the parts to split, as for :func:`multicard.parallelize`; None: all that can be.
    """

    path: pathlib.Path
    dtype: torch.dtype | None = None
    variant: str | None = None
    trust_remote_code: bool = False
    lora: tuple[pathlib.Path, ...] = ()
    parts: tuple[str, ...] | None = None

    def check(self, degrees: ParallelConfig) -> None:
        """Refuse a folder, as far as possible without starting a rank. Reads configs and the headers of weight files.

        Raises:
            ConfigError: diffusers isn't installed; no such folder.
            CheckpointError: a file that is missing, truncated or damaged; a class that this diffusers doesn't have.
            UnsupportedError: pickled weights, Python code in the folder, a model without a plan for these degrees.
        """
        need("diffusers", "a diffusers pipeline")
        index = self.index()
        self._check_class(index.get("_class_name"))
        for name, (library, cls) in components(index).items():
            self._check_component(name, library, cls)
        self._check_variant(list(components(index)))
        for path in self.lora:
            lora_file(path)
        split = "denoiser" in check_parts(self.parts) and degrees.tp * degrees.ring * degrees.ulysses > 1
        for name, cls in denoisers_of(index).items() if split else ():
            check_plans(self.path / name, cls, degrees)

    def index(self) -> dict[str, Any]:
        """What model_index.json says.

        Raises:
            CheckpointError: a folder without one.
            UnsupportedError: a file instead of a folder.
        """
        if self.path.is_file():
            raise UnsupportedError(
                f"{self.path} is a single file: load it with diffusers' from_single_file, then mc.parallelize; or "
                "save_pretrained it once as a folder"
            )
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: no such folder; download a pipeline first with `hf download NAME`")
        file = self.path / INDEX
        if not file.is_file():
            raise CheckpointError(f"{self.path}: no {INDEX}, so it isn't a diffusers pipeline")
        return read_json(self.path, INDEX)

    def _check_class(self, name: Any) -> None:
        import diffusers

        if isinstance(name, list) and len(name) == 2:
            self._check_code(f"{name[0]}.py", f"{self.path / INDEX} asks for")
        elif not isinstance(name, str) or name not in dir(diffusers) or not _is_pipeline(getattr(diffusers, name)):
            hint = did_you_mean(str(name), [n for n in dir(diffusers) if n.endswith("Pipeline")])
            raise CheckpointError(f"{self.path / INDEX}: diffusers {diffusers.__version__} has no class {name!r}{hint}")

    def _check_component(self, name: str, library: str, cls: str) -> None:
        folder = self.path / name
        if not os.path.isdir(folder):  # False, too, for a name that is too long
            raise CheckpointError(f"{folder}: no such folder, and {INDEX} names it as a {cls}")
        if os.path.exists(folder / f"{library}.py"):
            self._check_code(f"{name}/{library}.py", f"{cls} is defined in")
        elif library not in LIBRARIES and library not in _pipeline_modules():
            self._check_library(library, name)
        for config in sorted(folder.glob("*config.json")):
            read_config(folder, config.name)
        for file in sorted(folder.glob("*.index.json" if self.variant is None else f"*.index.{self.variant}.json")):
            for shard in set(read_json(folder, file.name).get("weight_map", {}).values()):
                if not (folder / str(shard)).is_file():
                    raise CheckpointError(f"{folder / str(shard)}: no such file, and {file.name} names it")
        weights = sorted(folder.glob("*.safetensors"))
        for file in weights:
            read_header(file)
        if weights or not (folder / "config.json").is_file() or any(kind in cls for kind in WITHOUT_WEIGHTS):
            return
        if any(any(folder.glob(pattern)) for pattern in PICKLED):
            raise UnsupportedError(
                f"{folder} holds pickled weights only, which can run code: if you trust it, convert the pipeline: "
                f"python -c \"import diffusers as d; d.DiffusionPipeline.from_pretrained('{self.path}', "
                f"use_safetensors=False).save_pretrained('{self.path}-safetensors')\""
            )
        raise CheckpointError(f"{folder}: no safetensors weights in it")

    def _check_variant(self, names: list[str]) -> None:
        """Check that each component has the requested variant or plain weights, and at least one has the variant."""
        found = {name: variants(self.path / name) for name in names}
        for name, there in found.items():
            if there and not there & {"", self.variant}:
                missing = "no plain ones" if self.variant is None else f"none of variant {self.variant}"
                raise CheckpointError(
                    f"{self.path / name} has weights of variant {', '.join(sorted(there))}, {missing}: "
                    f"pass variant={min(there)!r} (--variant {min(there)})"
                )
        if self.variant is not None and not any(self.variant in there for there in found.values()):
            have = ", ".join(sorted(set().union(*found.values()) - {""})) or "none"
            raise CheckpointError(
                f"{self.path}: no weights of variant {self.variant!r}; variants there: {have}. Pass one of them, or no "
                "variant (--variant)"
            )

    def _check_library(self, library: str, name: str) -> None:
        if not self.trust_remote_code:
            raise UnsupportedError(
                f"{self.path / INDEX}: {name} is of the Python module {library!r}, and importing it runs its code: "
                f"components are of {', '.join(LIBRARIES)} or diffusers' pipelines; trust_remote_code=True allows it"
            )

    def _check_code(self, file: str, why: str) -> None:
        if not self.trust_remote_code:
            raise UnsupportedError(
                f"{why} {file}, Python code in the folder: read it, and pass trust_remote_code=True to run it"
            )


def _is_pipeline(cls: Any) -> bool:
    import diffusers

    return isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)


def _pipeline_modules() -> list[str]:
    """Names by which an index means the modules of diffusers' own pipelines, as for safety checkers."""
    import diffusers

    return dir(diffusers.pipelines)


def variants(folder: pathlib.Path) -> set[str]:
    """The variants of a component's weights; "" stands for plain weights."""
    found = [VARIANT.fullmatch(file.name) for file in folder.glob("*.safetensors")]
    return {match.group(1) if match else "" for match in found}


def components(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Library and class of a pipeline's components, by name, without those that are left out."""
    return {name: (value[0], value[1]) for name, value in pairs(index).items() if value[0] is not None}


def denoisers_of(index: dict[str, Any]) -> dict[str, str]:
    """Classes of diffusers' own denoisers, by name."""
    return {
        name: cls for name, (library, cls) in components(index).items() if library == "diffusers" and NAMES.search(name)
    }


def pairs(index: dict[str, Any]) -> dict[str, list[Any]]:
    """The entries that are components; a pipeline's own class may be a pair too, of a file and a class in it."""
    return {
        name: value
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list)
        if [type(part) for part in value] in ([str, str], [type(None)] * 2)
    }


def check_plans(folder: pathlib.Path, name: str, degrees: ParallelConfig) -> None:
    """Refuse a denoiser that can't be split over these degrees, by a dry run on the meta device."""
    import diffusers

    cls = getattr(diffusers, name, None)
    if not isinstance(cls, type) or not issubclass(cls, diffusers.ModelMixin):
        raise CheckpointError(f"{folder.parent / INDEX}: diffusers {diffusers.__version__} has no model {name!r}")
    config = {key: value for key, value in read_json(folder, "config.json").items() if key != "quantization_config"}
    where = f"{folder / 'config.json'}: {name} can't be built from it"
    with offline(), blamed_on(where), torch.device("meta"):
        model = cls.from_config(config)
    if degrees.tp > 1:
        tensor_changes(model, Axis("tp", 0, degrees.tp))
    if degrees.ring * degrees.ulysses > 1 and not has_rows(model):
        check_sequence(model, sequence_plan(model))
