"""Which tensors and layers are quantised, by whom: told by class names and dtypes, without importing their packages."""

from __future__ import annotations

from torch import Tensor, nn

from multicard.errors import UnsupportedError

LAYERS = {
    "Linear8bitLt": "bitsandbytes' 8-bit",
    "Linear4bit": "bitsandbytes' 4-bit",
    "LinearNF4": "bitsandbytes' NF4",
    "LinearFP4": "bitsandbytes' FP4",
    "GGUFLinear": "diffusers' GGUF",
    "FP8Linear": "transformers' FP8",
}
"""Classes of quantised linear layers, in words."""


def quantized(module: nn.Module) -> str | None:
    """How a layer is quantised, in words; None if its weight is plain numbers."""
    for cls in type(module).__mro__:
        if cls.__name__ in LAYERS:
            return LAYERS[cls.__name__]
        if cls.__module__.startswith("torch.ao.nn.quantized"):
            return "torch's int8"
    if hasattr(module, "qweight"):  # GPTQ, AWQ and others
        return f"{type(module).__module__.partition('.')[0]}'s {type(module).__name__}"
    weight = getattr(module, "weight", None)
    return quantized_tensor(weight) if isinstance(weight, Tensor) else None


def quantized_tensor(tensor: Tensor) -> str | None:
    """The same for a parameter."""
    kind = type(tensor.detach())
    if kind.__module__.partition(".")[0] != "torch":
        return f"{kind.__module__.partition('.')[0]}'s {kind.__name__}"
    if tensor.is_quantized or not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        return str(tensor.dtype).removeprefix("torch.")
    return None


def check_plain(path: str, kind: str | None) -> None:
    """Refuse to split a quantised layer or parameter.

    Args:
        kind: how it is quantised, as :func:`quantized` says.

    Raises:
        UnsupportedError: names it.
    """
    if kind is not None:
        raise UnsupportedError(
            f"{path} is quantised ({kind}), which tensor parallelism can't split: load the model without quantising "
            "it, or use ring, ulysses or cfg, which leave weights whole"
        )
