"""The parts of a pipeline besides its denoisers: which components they are, and how each is split."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from multicard.errors import ConfigError, UnsupportedError
from multicard.extras import has
from multicard.integrations.diffusers.checks import check_uncompiled
from multicard.integrations.diffusers.denoisers import denoisers, uncompiled
from multicard.integrations.diffusers.rows import autoencoder_changes, is_autoencoder, split_by_rows
from multicard.integrations.styles import Change
from multicard.mesh import ParallelMesh

PARTS = ("denoiser", "text", "vae")


@dataclasses.dataclass(frozen=True)
class Part:
    """One kind of component besides denoisers.

    Attributes:
        holds: whether a component is of this kind.
        is_split: whether it has been split already.
        changes: the changes that split it over a mesh: checked, not made yet. Raises UnsupportedError, saying why not.
    """

    holds: Callable[[nn.Module], bool]
    is_split: Callable[[nn.Module], bool]
    changes: Callable[[Any, ParallelMesh], list[Change]]


def _is_text(module: nn.Module) -> bool:
    if not has("transformers"):
        return False
    from transformers import PreTrainedModel

    return isinstance(uncompiled(module), PreTrainedModel)


def _is_split_text(module: nn.Module) -> bool:
    from multicard.integrations.transformers.doors import is_split

    return is_split(uncompiled(module))


def _text_changes(module: Any, mesh: ParallelMesh) -> list[Change]:
    """By weights over all ranks of a replica, which all encode the same prompts."""
    from multicard.integrations.transformers.part import weight_changes

    check_uncompiled(module)
    return weight_changes(module, mesh.by_weights())


BESIDE: Mapping[str, Part] = {
    "text": Part(_is_text, _is_split_text, _text_changes),
    "vae": Part(is_autoencoder, lambda module: split_by_rows(module) is not None, autoencoder_changes),
}
"""Text encoders, and image encoders beside them, by weights; autoencoders by rows."""


def check_parts(parts: Collection[str] | None) -> tuple[str, ...]:
    """The parts to split; None: all.

    Raises:
        ConfigError: an unknown name.
    """
    given = (parts,) if isinstance(parts, str) else tuple(PARTS if parts is None else parts)
    if unknown := [part for part in given if part not in PARTS]:
        raise ConfigError(f"parts: unknown part {unknown[0]!r}: must be some of {', '.join(PARTS)}")
    return given


def kinds(pipe: Any) -> dict[str, str]:
    """The part that each component with weights belongs to, by the component's name."""
    modules = {name: c for name, c in pipe.components.items() if isinstance(c, nn.Module)}
    first = dict.fromkeys(_denoisers(pipe), "denoiser")
    return {name: first.get(name) or _kind(module) for name, module in modules.items()}


def _denoisers(pipe: Any) -> Collection[str]:
    try:
        return denoisers(pipe)
    except UnsupportedError:
        return ()


def _kind(module: nn.Module) -> str:
    return next((name for name, part in BESIDE.items() if part.holds(module)), "")


def beside(pipe: Any, parts: Collection[str]) -> dict[str, nn.Module]:
    """The components of ``parts``, without denoisers, that aren't split yet, by name."""
    found = {name: pipe.components[name] for name, kind in kinds(pipe).items() if kind in BESIDE and kind in parts}
    return {name: module for name, module in found.items() if not BESIDE[_kind(module)].is_split(module)}


def part_changes(
    components: Mapping[str, nn.Module], mesh: ParallelMesh, named: bool
) -> tuple[list[Change], dict[str, str]]:
    """The changes that split ``components``, and why others stay whole, by name.

    Args:
        named: the caller has asked for these parts by name.

    Raises:
        UnsupportedError: a component of a part that was named can't be split.
    """
    found: list[Change] = []
    whole: dict[str, str] = {}
    for name, module in components.items():
        kind = _kind(module)
        try:
            found += BESIDE[kind].changes(module, mesh)
        except (ConfigError, UnsupportedError) as error:
            if named:
                raise type(error)(f"{name}: {error}; or leave {kind!r} out of parts=") from None
            whole[name] = str(error)
    return found, whole
