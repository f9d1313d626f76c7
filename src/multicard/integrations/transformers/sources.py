"""The source of each parameter in a ``transformers`` checkpoint, by the library's own renamings and converters."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from multicard.errors import UnsupportedError
from multicard.layers.shard import shard_of
from multicard.weights import Converted, Plain, Source, SourceOf, Stacked, TensorFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Sources:
    """How a checkpoint's names map to the model's; made before the model is split."""

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers import conversion_mapping, core_model_loading

        mapping = internal(conversion_mapping, "get_model_conversion_mapping")(model)
        renaming, converter = (internal(core_model_loading, f"Weight{kind}") for kind in ("Renaming", "Converter"))
        self.renamings = [entry for entry in mapping if isinstance(entry, renaming)]
        self.converters = [entry for entry in mapping if isinstance(entry, converter)]
        self.model, self.prefix = model, model.base_model_prefix
        self.names = dict.fromkeys(model.state_dict(), True)
        self.tied: dict[str, str] = dict(internal(model, "all_tied_weights_keys"))

    def find(self, checkpoint: TensorFiles) -> SourceOf:
        """The source of every parameter and persistent buffer."""
        from transformers import core_model_loading

        natural = internal(core_model_loading, "dot_natural_key")
        rename = internal(core_model_loading, "rename_source_key")
        by_pattern = {pattern: entry for entry in self.converters for pattern in entry.source_patterns}
        found: dict[str, Source] = {}
        converted: dict[str, tuple[Any, dict[str, list[str]]]] = {}
        for key in sorted(checkpoint.tensors, key=natural):
            name, pattern = rename(key, self.renamings, self.converters, self.prefix, self.names)
            if name not in self.names and key in self.names:
                name, pattern = key, None
            if name not in self.names:
                continue  # another task's head, an old version's buffer: only missing tensors are errors
            if pattern is None:
                found[name] = Plain(key)
            else:
                _, keys = converted.setdefault(name, (by_pattern[pattern], {}))
                keys.setdefault(pattern, []).append(key)
        for name, (converter, keys) in converted.items():
            found |= self._converted(name, converter, keys)
        for name, origin in self.tied.items():
            if origin in found:
                found[name] = found[origin]
            elif name in found:
                found[origin] = found[name]
        return found.get

    def _converted(self, name: str, converter: Any, keys: dict[str, list[str]]) -> dict[str, Source]:
        """The source of a parameter that a converter of ``transformers`` makes of tensors, by the pattern each matched.

        Stacked experts, with or without gate and up put one after the other, can be read by slices. Any other
        conversion needs whole tensors.
        """
        kinds = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
        if kinds in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
            return {name: Stacked(list(keys.values()))}

        def convert(whole: Callable[[str], Tensor]) -> dict[str, Tensor]:
            once = copy.deepcopy(converter)
            for pattern, tensors in keys.items():
                for key in tensors:
                    once.add_tensor(name, key, pattern, functools.partial(whole, key))
            made = once.convert(name, model=_Whole(self.model), config=self.model.config)
            return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

        targets = converter.target_patterns  # the name contains the first one
        return dict.fromkeys((name.replace(targets[0], target) for target in targets), Converted(convert))


class _Whole:
    """The model for converters that ask for the sizes of its parameters: it has the sizes before the split."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty(shard_of(self._model.get_parameter(name)).shape, device="meta")


def internal(owner: Any, name: str) -> Any:
    """A private name of transformers that loading by slices needs."""
    import transformers

    found = getattr(owner, name, None)
    if found is None:
        raise UnsupportedError(
            f"transformers {transformers.__version__} has no {name}, which mc.from_pretrained needs: install a "
            "version of transformers that this multicard was tested with, or load the model yourself and use "
            "mc.parallelize"
        )
    return found
