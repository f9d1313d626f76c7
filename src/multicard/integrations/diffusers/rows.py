"""Networks of convolutions over ranks by rows of pictures: autoencoders, U-Nets, and the networks beside U-Nets."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from multicard.errors import UnsupportedError
from multicard.integrations.diffusers.checks import check_rows
from multicard.integrations.diffusers.denoisers import uncompiled
from multicard.integrations.diffusers.families import ROWS
from multicard.integrations.diffusers.sequence import SPLIT as SEQUENCE
from multicard.integrations.intercept import Plain, intercept
from multicard.integrations.seams import Hooks, bypassed
from multicard.integrations.styles import Change
from multicard.mesh import ParallelMesh
from multicard.replica import Replica
from multicard.spatial import NewRows, Rows, Split, split_rows

SPLIT = "_multicard_rows"
HALVES = ("encoder", "decoder", "decoder_unet")
"""The parts of an autoencoder that do its work, by attribute. What it does around them (quantisation, tiles, frames one
after the other) runs on whole tensors, so each tile and frame is split by itself."""

PACKAGES = ("unets", "controlnets", "adapter")
"""Packages of diffusers.models whose networks are split by rows."""


def has_rows(module: nn.Module) -> bool:
    """Whether a denoiser, or a network beside one, is of convolutions over rows."""
    packages = [base.__module__.split(".") for base in type(uncompiled(module)).__mro__]
    unets = any(p[:2] == ["diffusers", "models"] and any(name in p for name in PACKAGES) for p in packages)
    return unets or type(uncompiled(module)).__name__ in ROWS


def beside_unets(pipe: Any) -> list[nn.Module]:
    """The networks of a pipeline that run beside its U-Net at each step: ControlNets and adapters."""
    modules = [component for component in pipe.components.values() if isinstance(component, nn.Module)]
    if not any("unets" in type(uncompiled(module)).__module__.split(".") for module in modules):
        return []
    found = [module for module in modules if any(name in type(module).__module__ for name in PACKAGES[1:])]
    return [net for module in found for net in getattr(module, "nets", [module])]


def is_autoencoder(module: nn.Module) -> bool:
    return any("autoencoders" in base.__module__.split(".") for base in type(uncompiled(module)).__mro__)


def autoencoder_changes(model: nn.Module, mesh: ParallelMesh) -> list[Change]:
    """The changes that split an autoencoder's work over ``mesh.replica``: checked, not made yet.

    Raises:
        UnsupportedError: it is compiled, or has no convolutions over rows (audio).
    """
    halves = {name: half for name in HALVES if isinstance(half := getattr(model, name, None), nn.Module)}
    if not any(isinstance(part, (nn.Conv2d, nn.Conv3d)) for half in halves.values() for part in half.modules()):
        raise UnsupportedError(f"{type(model).__name__} has no convolutions over rows of pictures")
    check_rows(type(model).__name__, model, model.modules())
    split = Split.over(mesh.replica)
    return [
        *(
            functools.partial(
                intercept, half, "__call__", RowDoor(f"{type(model).__name__}.{name}", mesh, split), "run"
            )
            for name, half in halves.items()
        ),
        lambda: vars(model).update({SPLIT: split}),
    ]


def split_by_rows(model: nn.Module) -> Split | None:
    """Over which ranks an autoencoder's or U-Net's rows are split; None: they aren't."""
    return vars(uncompiled(model)).get(SPLIT)


class RowDoor:
    """The door of one half of an autoencoder: whole tensors in and out, rows inside."""

    def __init__(self, name: str, mesh: ParallelMesh, split: Split) -> None:
        self._name, self._split = name, split
        self._replica = Replica(mesh)

    def __deepcopy__(self, memo: Any) -> RowDoor:
        return self

    def run(self, module: nn.Module, plain: Plain, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The half's ``__call__``."""
        check_rows(self._name, module, module.modules())
        pictures = {f"argument {i}": x for i, x in enumerate((*args, *kwargs.values())) if _is_picture(x)}
        self._replica.compare(f"a call of {self._name}", pictures)
        with torch.no_grad(), NewRows(self._split):
            return gathered(plain(*(_rows(x, self._split) for x in args), **_named_rows(kwargs, self._split)))

    def traced(self, module: nn.Module) -> None:
        """The autoencoder is being compiled around this half."""
        from multicard.integrations.uncompiled import ROWS, refuse

        refuse(self._name, ROWS)


class RowSplit:
    """A U-Net's rows, split over ``mesh.sequence``; or those of a network beside one."""

    def __init__(self, model: nn.Module, mesh: ParallelMesh) -> None:
        self.mesh, self.split, self._model = mesh, Split(mesh), model
        self._modules = list(model.modules())
        self._name, self._split_tensors = type(model).__name__, 0
        self._hooks = Hooks("diffusers")
        self._hooks.before(model, self._begin, prepend=True)
        self._hooks.after(model, self._end)
        vars(model).update({SPLIT: self.split, SEQUENCE: self})

    def renew(self) -> None:
        """Layers may have been replaced."""
        self._modules = list(self._model.modules())

    @contextlib.contextmanager
    def proved(self) -> Iterator[None]:
        """Entered while the model runs; raises UnsupportedError afterwards unless it was split."""
        self._hooks.check()
        check_rows(self._name, self._model, self._modules)
        self._split_tensors = 0
        with torch.no_grad(), NewRows(self.split):
            yield
        if not self._split_tensors:
            raise bypassed("diffusers", f"no rows of {self._name} were split")

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._split_tensors += sum(map(_is_picture, (*args, *kwargs.values())))
        return tuple(_rows(x, self.split) for x in args), _named_rows(kwargs, self.split)

    def _end(self, module: nn.Module, args: Any, output: Any) -> Any:
        return gathered(output)


def _is_picture(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, Rows) and value.dim() >= 4 and value.is_floating_point()


def _rows(value: Any, split: Split) -> Any:
    """This rank's rows of a picture ``(..., rows, columns)``; any other value as it is."""
    return split_rows(value, split) if _is_picture(value) else value


def _named_rows(kwargs: Mapping[str, Any], split: Split) -> dict[str, Any]:
    return {name: _rows(value, split) for name, value in kwargs.items()}


def gathered(output: Any) -> Any:
    """A module's output with whole tensors; caches of frames (dicts) stay split."""
    if isinstance(output, Rows):
        return output.gathered()
    if type(output) in (tuple, list):
        return type(output)(map(gathered, output))
    if hasattr(output, "__dataclass_fields__"):
        for name in output.__dataclass_fields__:
            whole = gathered(getattr(output, name))
            if isinstance(output, dict):
                output[name] = whole
            else:
                setattr(output, name, whole)
    return output
