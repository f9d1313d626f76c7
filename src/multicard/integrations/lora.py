"""peft's LoRA on split linear layers: those that a model has when it is split, and those that it gets afterwards.

A rank keeps A ``(r, in)`` and B ``(out, r)`` whole, as files hold them, so whatever peft does with an adapter works as
before: loading, saving, swapping, scaling. A layer multiplies with its share of them: beside a column-parallel weight
with the same rows of B; beside a row-parallel one with the same columns of A, and the all-reduce that sums the weight's
products sums B A x too.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora import model as dispatching
from peft.tuners.tuners_utils import BaseTuner, check_adapters_to_merge, check_target_module_exists
from torch import Tensor, nn

from multicard import collectives
from multicard.errors import UnsupportedError
from multicard.integrations.intercept import PLAIN
from multicard.integrations.quantized import quantized_tensor
from multicard.layers import ColumnParallelLinear, RowParallelLinear
from multicard.layers.packed import add_to_weight
from multicard.layers.shard import Spans

Split = ColumnParallelLinear | RowParallelLinear
BEFORE = "load it before mc.parallelize"
PLAIN_STARTS = (True, False, "gaussian")
"""Values of a config's ``init_lora_weights`` that don't read the weight, of which a rank has a part."""


class ParallelLora(lora.Linear):
    """peft's LoRA layer around a split linear layer."""

    base_layer: Split

    def __init__(self, base_layer: Split, adapter_name: str, **settings: Any) -> None:
        super().__init__(base_layer, adapter_name, **settings)
        self.fan_in_fan_out = False  # GPT-2's transposed weights aren't, once they are split

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """The whole layer's, as in files."""
        return self.base_layer.in_features, self.base_layer.out_features

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, with the active adapters. The layer's collectives and no others."""
        if kwargs.get("adapter_names") is not None:
            raise UnsupportedError("adapter_names= with tp: one set of adapters a batch; use set_adapter, or ulysses")
        if self.disable_adapters and self.merged:
            self.unmerge()
        plain = self.disable_adapters or self.merged
        return self.base_layer(x, None if plain else self._added(x))

    def _added(self, x: Tensor) -> Tensor | None:
        """This rank's part of what the active adapters add; None if it has none."""
        total = None
        for name in self.active_adapters:
            if name not in self.lora_A or not self.base_layer.spans:
                continue
            dropout = self.lora_dropout[name]
            if dropout.training and not isinstance(dropout, nn.Identity):
                raise UnsupportedError("LoRA dropout in a split model: it is for inference; call its eval()")
            a, b = self._share(name)
            product: Tensor = (x.to(a.dtype) @ a.T) @ b.T
            if (bias := self._bias(name)) is not None:
                product = product + bias
            product = product * self.scaling[name]
            total = product if total is None else total + product
        return total

    def _share(self, name: str) -> tuple[Tensor, Tensor]:
        """This rank's parts of A and B."""
        a, b = (matrices[name].get_parameter("weight").detach() for matrices in (self.lora_A, self.lora_B))
        if isinstance(self.base_layer, RowParallelLinear):
            return _take(a, 1, self.base_layer.spans), b
        return a, _take(b, 0, self.base_layer.spans)

    def _bias(self, name: str, merging: bool = False) -> Tensor | None:
        """This rank's part of an adapter's bias. In a sum over ranks, the first one adds it."""
        if not self.lora_bias[name]:
            return None
        bias = self.lora_B[name].get_parameter("bias").detach()
        if isinstance(self.base_layer, ColumnParallelLinear):
            return _take(bias, 0, self.base_layer.spans)
        return bias if merging or self.base_layer.axis.rank == 0 else None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to this rank's part of the weight."""
        a, b = self._share(adapter)
        wide = torch.promote_types(b.dtype, torch.float32)
        return ((b.to(wide) @ a.to(wide)) * self.scaling[adapter]).to(b.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the weight. With ``safe_merge``, one small all-reduce for each first tells of NaNs."""
        for name in check_adapters_to_merge(self, adapter_names) or ():
            if name in self.lora_A:
                if safe_merge:
                    self._check_finite(name)
                self._shift(name, 1)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take the merged adapters out of the weight."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.lora_A:
                self._shift(name, -1)

    def _shift(self, name: str, sign: int) -> None:
        if (kind := quantized_tensor(self.base_layer.weight)) is not None:
            raise UnsupportedError(f"adapter {name!r} can't be merged into a weight that is quantised ({kind})")
        if self.base_layer.spans:
            add_to_weight(self.base_layer, self.get_delta_weight(name) * sign)
        if (bias := self._bias(name, merging=True)) is not None:
            if self.base_layer.bias is None:
                raise UnsupportedError(f"adapter {name!r} has a bias and its layer none: it can't be merged")
            self.base_layer.bias.detach().add_(bias * self.scaling[name] * sign)

    def _check_finite(self, name: str) -> None:
        odd = (~torch.isfinite(self.get_delta_weight(name))).sum()
        if int(collectives.all_reduce(odd, self.base_layer.axis)):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")


def _take(whole: Tensor, dim: int, spans: Spans) -> Tensor:
    parts = [whole.narrow(dim, span.start, len(span)) for span in spans]
    if not parts:
        return whole.narrow(dim, 0, 0)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def put_inside(adapter: nn.Module, layer: Split) -> None:
    """Give a LoRA layer of peft a split layer in place of the whole one; its adapters stay."""
    assert isinstance(adapter, lora.Linear)
    adapter.base_layer = layer
    adapter.fan_in_fan_out = False
    adapter.__class__ = ParallelLora


def follow() -> None:
    """From now on peft puts :class:`ParallelLora` on split layers, and refuses what can't be on a split model."""
    if hasattr(dispatching.dispatch_default, PLAIN):
        return
    plain = dispatching.dispatch_default

    @functools.wraps(plain)
    def dispatch(target: nn.Module, adapter_name: str, **settings: Any) -> nn.Module | None:
        if not isinstance(target, Split):
            return plain(target, adapter_name, **settings)
        settings.pop("parameter_name", None)
        return ParallelLora(target, adapter_name, **settings)

    setattr(dispatch, PLAIN, plain)
    setattr(dispatching, "dispatch_default", dispatch)  # noqa: B010
    setattr(BaseTuner, "inject_adapter", _checked(BaseTuner.inject_adapter))  # noqa: B010


def _checked(inject: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(inject)
    def inject_adapter(tuner: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        split = any(isinstance(module, Split) for module in model.modules())
        if split:
            config = converted(tuner.peft_config[adapter_name], model)
            check_config(config, adapter_name)
            check_targets(model, config, adapter_name, kwargs.get("state_dict"))
        inject(tuner, model, adapter_name, *args, **kwargs)
        if split:
            model.requires_grad_(False).eval()  # a split model is for inference

    return inject_adapter


def converted(config: Any, model: Any) -> Any:
    """The config as peft will use it: older names of a ``transformers`` model's modules may mean parameters today."""
    if not hasattr(getattr(model, "config", None), "model_type"):
        return config
    from peft.utils import transformers_weight_conversion as conversion

    config, mapping = copy.deepcopy(config), conversion.get_model_conversion_mapping(model)
    conversion.convert_peft_config_for_transformers(config, model=model, conversions=mapping)
    return config


def check_config(config: Any, name: str) -> None:
    """Refuse adapters that can't be put on a split model.

    Raises:
        UnsupportedError: names what is particular about the adapter, and the fix.
    """
    kind = config.peft_type.value
    if kind != "LORA":
        raise UnsupportedError(f"adapter {name!r} is of peft's type {kind}, and a split model takes LORA: {BEFORE}")
    variants = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    others = ("modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication")
    for setting in (*variants, *others):
        if value := getattr(config, setting, None):
            raise UnsupportedError(f"adapter {name!r} with {setting}={value!r} on a split model: {BEFORE}")
    if config.bias != "none":
        raise UnsupportedError(f"adapter {name!r} with bias={config.bias!r} on a split model: {BEFORE}")
    if config.init_lora_weights not in PLAIN_STARTS:
        raise UnsupportedError(
            f"adapter {name!r} with init_lora_weights={config.init_lora_weights!r}, which reads whole weights, on a "
            f"split model: {BEFORE}"
        )
    if config.target_modules == "all-linear":
        raise UnsupportedError(
            f"adapter {name!r} with target_modules='all-linear' on a split model: name the modules, or {BEFORE}"
        )


def check_targets(model: nn.Module, config: Any, name: str, keys: Sequence[str] | None) -> None:
    """Refuse an adapter on a split module that isn't a linear layer within the model: on an embedding, or on the head
    of a language model, with which peft saves the whole weight.

    Args:
        keys: names of the adapter's tensors, if those say where it goes; None: the config does.
    """
    named = None if keys is None else {key.rsplit(".lora_", 1)[0].removeprefix("_orig_mod.") for key in keys}
    headed = hasattr(model, "get_output_embeddings")
    for path, module in model.named_modules():
        cut = any(hasattr(parameter, "shard") for parameter in module.parameters(recurse=False))
        inner = isinstance(module, Split) and not (headed and getattr(module, "gather", None) is not None)
        if not cut or inner:
            continue
        if path in named if named is not None else check_target_module_exists(config, path):
            raise UnsupportedError(f"adapter {name!r} is for {path}, a {type(module).__name__} that is split: {BEFORE}")
