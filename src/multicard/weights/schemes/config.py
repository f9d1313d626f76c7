"""Reading a ``quantization_config``. What isn't understood is refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from multicard.errors import CheckpointError, UnsupportedError
from multicard.values import is_whole
from multicard.weights.schemes.awq import Awq
from multicard.weights.schemes.compressed import Compressed
from multicard.weights.schemes.fp8 import SquareFp8
from multicard.weights.schemes.gptq import Gptq
from multicard.weights.schemes.int8 import RowInt8
from multicard.weights.schemes.method import Method
from multicard.weights.schemes.scheme import Rule, Scheme, exactly

LARGEST_GROUP = 1 << 20
CONVENTIONS = {"gptq": 1, "gptq_v2": 0}
"""By ``checkpoint_format``: what GPTQ's zeros are stored less."""

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
HEAD, ANY = exactly("lm_head"), ""


def scheme_of(raw: Any) -> Scheme:
    """What a ``quantization_config`` says.

    Raises:
        UnsupportedError: a method, format or setting that can't be read.
        CheckpointError: a value that can't be.
    """
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"quantization_config={raw!r}: must be an object")
    name = raw.get("quant_method")
    if not isinstance(name, str) or name not in METHODS:
        raise UnsupportedError(
            f"quantization_config: quant_method {name!r} isn't read; {', '.join(METHODS)} are, and GGUF files"
        )
    return Scheme(name, METHODS[name](raw))


def _gptq(raw: Mapping[str, Any]) -> tuple[Rule, ...]:
    convention = raw.get("checkpoint_format", raw.get("format")) or "gptq"
    if convention not in CONVENTIONS:
        raise UnsupportedError(f"GPTQ's checkpoint_format {convention!r} isn't read; {', '.join(CONVENTIONS)} are")
    if (dtype := raw.get("pack_dtype") or "int32") != "int32":
        raise UnsupportedError(f"GPTQ's pack_dtype {dtype!r} isn't read; int32 is")

    def method(changes: Mapping[str, Any]) -> Gptq:
        said = {**raw, **changes}
        bits = said.get("bits")
        if bits not in (2, 4, 8):
            raise UnsupportedError(f"GPTQ with bits={bits!r} isn't read; 2, 4 and 8 are")
        size = _group_size(said.get("group_size"), bits)
        return Gptq(bits, size, CONVENTIONS[convention], bool(said.get("desc_act")))

    rules = [] if raw.get("lm_head") else [Rule(HEAD, None)]
    for pattern, changes in _object(raw, "dynamic").items():
        if pattern.startswith("-:"):
            rules.append(Rule(pattern[2:], None))
        elif isinstance(changes, Mapping):
            rules.append(Rule(pattern.removeprefix("+:"), method(changes)))
        else:
            raise CheckpointError(f"quantization_config: dynamic has {changes!r} for {pattern!r}: must be an object")
    inside = raw.get("modules_in_block_to_quantize")
    if inside is None:
        return (*rules, Rule(ANY, method({})))
    flat = [name for each in inside for name in (each if isinstance(each, list) else [each])]
    return (*rules, *(Rule(rf".*\.{re.escape(_text(name))}\Z", method({})) for name in flat))


def _awq(raw: Mapping[str, Any]) -> tuple[Rule, ...]:
    bits, version = raw.get("bits", raw.get("w_bit")), str(raw.get("version") or raw.get("format") or "gemm").lower()
    if bits != 4 or version != "gemm":
        raise UnsupportedError(f"AWQ with bits={bits!r} and version {version!r} isn't read; bits=4 and 'gemm' are")
    if not raw.get("zero_point", True):
        raise UnsupportedError("AWQ with zero_point=false isn't read; with zeros it is")
    method = Awq(_group_size(raw.get("group_size", raw.get("q_group_size")), bits))
    return (Rule(HEAD, None), *_left_out(raw, "modules_to_not_convert"), Rule(ANY, method))


def _fp8(raw: Mapping[str, Any]) -> tuple[Rule, ...]:
    if (activations := raw.get("activation_scheme", "dynamic")) != "dynamic":
        raise UnsupportedError(f"FP8 with activation_scheme {activations!r} isn't read; 'dynamic' is")
    if (kind := raw.get("fmt", "e4m3")) != "e4m3" or raw.get("scale_fmt", "float") != "float":
        raise UnsupportedError(f"FP8 with fmt {kind!r} and scale_fmt {raw.get('scale_fmt')!r} isn't read; e4m3 is")
    if raw.get("modules_to_convert"):
        raise UnsupportedError("FP8 with modules_to_convert isn't read; linear modules are")
    method = _squares(raw.get("weight_block_size"), "weight_scale_inv")
    named = "modules_to_not_convert" if raw.get("modules_to_not_convert") is not None else "ignored_layers"
    head = [] if raw.get(named) is not None else [Rule(HEAD, None)]
    return (*_left_out(raw, named), *head, Rule(ANY, method))


def _bitsandbytes(raw: Mapping[str, Any]) -> tuple[Rule, ...]:
    if not raw.get("load_in_8bit") or raw.get("load_in_4bit"):
        raise UnsupportedError(
            "bitsandbytes with 4 bits (nf4, fp4) isn't read, 8 bits are: give the model's unquantised folder with "
            "quantize='int4', which rounds it as it is read, or a GPTQ, AWQ or GGUF checkpoint"
        )
    head = [Rule(HEAD, None)] if raw.get("llm_int8_skip_modules") is None else []
    return (*_left_out(raw, "llm_int8_skip_modules"), *head, Rule(ANY, RowInt8()))


def _compressed(raw: Mapping[str, Any]) -> tuple[Rule, ...]:
    for setting in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if (value := raw.get(setting)) and not (isinstance(value, Mapping) and value.get("format") == "dense"):
            raise UnsupportedError(f"compressed-tensors with {setting} isn't read; plain quantised weights are")
    rules = [Rule(_target(each), None) for each in _texts(raw, "ignore")]
    for name, group in _object(raw, "config_groups").items():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise UnsupportedError(f"compressed-tensors' {name} isn't read: it quantises no weights")
        for setting in ("input_activations", "output_activations"):
            if group.get(setting):
                raise UnsupportedError(
                    f"compressed-tensors' {name} quantises {setting} too, which isn't read: use a checkpoint with "
                    "quantised weights only (W4A16, W8A16)"
                )
        kind = group.get("format") or raw.get("format")
        if kind not in FORMATS:
            raise UnsupportedError(f"compressed-tensors' format {kind!r} isn't read; {', '.join(FORMATS)} are")
        method = _compressed_method(name, group["weights"], kind == "pack-quantized")
        rules += [Rule(_target(each), method) for each in _texts(group, "targets")]
    return tuple(sorted(rules, key=_rank))


def _rank(rule: Rule) -> tuple[bool, bool, bool]:
    """What is left out comes first, then names, then patterns, then the class."""
    return rule.method is not None, rule.pattern == ANY, not rule.pattern.endswith(r"\Z")


def _compressed_method(name: str, weights: Mapping[str, Any], packed: bool) -> Method:
    bits, kind, size = weights.get("num_bits"), weights.get("type", "int"), weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    zero = not weights.get("symmetric", True)
    said = (
        f"compressed-tensors' {name}, with num_bits={bits!r}, type={kind!r}, strategy={strategy!r}, "
        f"symmetric={not zero}"
    )
    if weights.get("dynamic"):
        raise UnsupportedError(f"{said}, quantises weights dynamically, which isn't read")
    if packed and kind == "int" and bits in (2, 4, 8):
        codes = "S8" if bits == 8 else f"U{bits}"
    elif not packed and (kind, bits) in (("int", 8), ("float", 8)):
        codes = "I8" if kind == "int" else "E4M3"
    else:
        raise UnsupportedError(f"{said}, isn't read; packed int of 2, 4 or 8 bits, int8 and FP8 are")
    if strategy == "block" and codes == "E4M3" and not zero:
        return _squares(weights.get("block_structure"), "weight_scale")
    if strategy not in ("group", "channel", "tensor") or (zero and (strategy == "tensor" or codes == "E4M3")):
        raise UnsupportedError(f"{said}, isn't read; groups and channels are, and symmetric tensors")
    if strategy == "group":
        return Compressed(codes, _group_size(size, int(codes[1]) if packed else 8), zero)
    return Compressed(codes, -1 if strategy == "channel" else 0, zero)


def _squares(size: Any, leaf: str) -> SquareFp8:
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(is_whole(n, 1, LARGEST_GROUP) for n in size):
        raise UnsupportedError(f"FP8 with blocks of size {size!r} isn't read; two whole numbers like [128, 128] are")
    return SquareFp8(int(size[0]), int(size[1]), leaf)


def _group_size(size: Any, bits: int) -> int:
    if is_whole(size, -1, -1):
        return -1
    if not is_whole(size, 1, LARGEST_GROUP) or size * bits % 32:
        raise UnsupportedError(f"group_size={size!r} with {bits} bits isn't read: -1, or what fills words of 32 bits")
    return int(size)


def _left_out(raw: Mapping[str, Any], setting: str) -> list[Rule]:
    """Rules as transformers reads such lists: the start of a name up to a dot, as a pattern, or its end."""
    names = _texts(raw, setting)
    found = [Rule(rf"(?:{name})(?:(?<=\.)|(?=\.|$))", None) for name in names]
    return [*found, *(Rule(rf".*{re.escape(name)}\Z", None) for name in names)]


def _target(target: str) -> str:
    """A pattern for what compressed-tensors calls a target: ``re:`` and one, a module's name, or a class."""
    if target.startswith("re:"):
        return target[3:]
    if target == "Linear":
        return ANY
    if "." not in target and target != "lm_head":
        raise UnsupportedError(f"compressed-tensors' target {target!r} isn't read; Linear, names and patterns are")
    return exactly(target)


def _object(raw: Mapping[str, Any], setting: str) -> Mapping[str, Any]:
    value = raw.get(setting) or {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"quantization_config: {setting}={value!r}: must be an object")
    return value


def _texts(raw: Mapping[str, Any], setting: str) -> list[str]:
    value = raw.get(setting) or []
    if not isinstance(value, list):
        raise CheckpointError(f"quantization_config: {setting}={value!r}: must be a list")
    return [_text(each) for each in value]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise CheckpointError(f"quantization_config has {value!r} where a module's name is expected")
    return value


METHODS = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "compressed-tensors": _compressed,
    "bitsandbytes": _bitsandbytes,
}
