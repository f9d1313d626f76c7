"""Which tensors of a ``transformers`` checkpoint make each parameter: the library's own renamings and converters."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from multicard.errors import UnsupportedError
from multicard.weights import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass
class Source:
    """What a parameter is read from: one tensor, or several that a converter of ``transformers`` makes it of.

    Attributes:
        keys: the checkpoint's names, by the converter's source pattern, in the order in which they are packed.
        converter: None for a tensor that is only renamed.
    """

    keys: dict[str, list[str]]
    converter: Any = None

    @property
    def packed(self) -> bool:
        """Single experts stacked, and perhaps gate and up put one after the other: it can be read by slices."""
        kinds = [(type(op).__name__, getattr(op, "dim", None)) for op in self.converter.operations]
        return kinds in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


class Sources:
    """How a checkpoint's names become the model's; made before the model is split."""

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers import conversion_mapping, core_model_loading

        mapping = internal(conversion_mapping, "get_model_conversion_mapping")(model)
        renaming, converter = (internal(core_model_loading, f"Weight{kind}") for kind in ("Renaming", "Converter"))
        self.renamings = [entry for entry in mapping if isinstance(entry, renaming)]
        self.converters = [entry for entry in mapping if isinstance(entry, converter)]
        self.prefix = model.base_model_prefix
        self.names = dict.fromkeys(model.state_dict(), True)
        self.tied: dict[str, str] = dict(internal(model, "all_tied_weights_keys"))

    def find(self, checkpoint: Checkpoint) -> dict[str, Source]:
        """Where every parameter comes from."""
        from transformers import core_model_loading

        natural = internal(core_model_loading, "dot_natural_key")
        rename = internal(core_model_loading, "rename_source_key")
        by_pattern = {pattern: entry for entry in self.converters for pattern in entry.source_patterns}
        found: dict[str, Source] = {}
        for key in sorted(checkpoint.tensors, key=natural):
            name, pattern = rename(key, self.renamings, self.converters, self.prefix, self.names)
            if name not in self.names and key in self.names:
                name, pattern = key, None
            if name not in self.names:
                continue  # another task's head, or an old version's buffer: completeness is what counts
            if pattern is None:
                found[name] = Source({"": [key]})
            else:
                source = found.setdefault(name, Source({}, by_pattern[pattern]))
                source.keys.setdefault(pattern, []).append(key)
        for name, origin in self.tied.items():
            if origin in found:
                found[name] = found[origin]
            elif name in found:
                found[origin] = found[name]
        return found


def internal(owner: Any, name: str) -> Any:
    """What transformers keeps for itself, and loading by slices needs."""
    import transformers

    found = getattr(owner, name, None)
    if found is None:
        raise UnsupportedError(
            f"transformers {transformers.__version__} has no {name}, which mc.from_pretrained builds on: install a "
            "version of transformers that this multicard was tested with, or load the model yourself and use "
            "mc.parallelize"
        )
    return found
