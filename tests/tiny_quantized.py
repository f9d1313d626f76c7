"""Tiny checkpoints of every quantisation scheme, with the transformers models that they stand for.

Codes, scales and zeros are random; the numbers are ``scale * (code - zero)``, as the schemes are described, not by our
code.
"""

import copy
import json

import safetensors.torch
import torch
import transformers

SIZES = {"vocab_size": 203, "num_hidden_layers": 2, "max_position_embeddings": 256}
MODELS = {
    "llama": {"hidden_size": 96, "intermediate_size": 176, "num_attention_heads": 6, "num_key_value_heads": 2},
    "qwen2": {"hidden_size": 80, "intermediate_size": 200, "num_attention_heads": 5, "num_key_value_heads": 5},
    "qwen3": {"hidden_size": 88, "intermediate_size": 136, "num_attention_heads": 4, "num_key_value_heads": 2},
}
HEAD_DIM = {"qwen3": 24}


def words(codes, bits, order=None):
    """Codes 0 to 2**bits - 1 as int32 words along the last dimension, the first lowest."""
    held = 32 // bits
    codes = torch.nn.functional.pad(codes.long(), (0, -codes.shape[-1] % held)).unflatten(-1, (-1, held))
    codes = codes if order is None else codes[..., order]
    return sum(codes[..., n] << bits * n for n in range(held)).to(torch.int32)


class Maker:
    """Random packed matrices.

    Attributes:
        tensors: of a matrix, by leaf, after :meth:`make`.
    """

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def codes(self, least, most, *shape):
        return torch.randint(least, most + 1, shape, generator=self.generator)

    def scales(self, dtype, largest, *shape):
        return ((0.3 + torch.rand(*shape, generator=self.generator)) / largest / 5).to(dtype)

    def fp8(self, *shape):
        return (100 * torch.randn(*shape, generator=self.generator)).to(torch.float8_e4m3fn)


def spread(values, group, columns):
    """``(rows, groups)`` to ``(rows, columns)``."""
    return values.repeat_interleave(group, 1)[:, :columns]


def gptq(make, rows, columns, bits=4, group=32, less=1, dtype=torch.float16):
    group = columns if group == -1 else group
    groups = -(-columns // group)
    codes, zeros = make.codes(0, 2**bits - 1, rows, columns), make.codes(0, 2**bits - 1, rows, groups)
    scales = make.scales(dtype, 2**bits, rows, groups)
    tensors = {
        "qweight": words(codes, bits).T.contiguous(),
        "qzeros": words((zeros.T - less) % 2**bits, bits),
        "scales": scales.T.contiguous(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // group,
        "bias": torch.zeros(rows, dtype=torch.float16),
    }
    return tensors, spread(scales.float(), group, columns) * (codes - spread(zeros, group, columns))


def awq(make, rows, columns, group=8):
    group = columns if group == -1 else group
    codes, zeros = make.codes(0, 15, rows, columns), make.codes(0, 15, rows, columns // group)
    scales = make.scales(torch.float16, 16, rows, columns // group)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {
        "qweight": words(codes.T, 4, order),
        "qzeros": words(zeros.T, 4, order),
        "scales": scales.T.contiguous(),
    }
    return tensors, spread(scales.float(), group, columns) * (codes - spread(zeros, group, columns))


def fp8(make, rows, columns, square=(16, 32), dtype=torch.bfloat16, leaf="weight_scale_inv"):
    high, wide = square
    weight, scales = make.fp8(rows, columns), make.scales(dtype, 100, -(-rows // high), -(-columns // wide))
    weight.view(torch.uint8)[0, :16] = torch.arange(16)  # the smallest, with an exponent of 0
    weight.view(torch.uint8)[1, :16] = torch.arange(16) + 128
    factors = spread(scales.float(), wide, columns).repeat_interleave(high, 0)[:rows]
    return {"weight": weight, leaf: scales}, weight.float() * factors


def bitsandbytes8(make, rows, columns):
    codes, largest = make.codes(-127, 127, rows, columns), 127 * make.scales(torch.float32, 256, rows, 1)
    tensors = {
        "weight": codes.to(torch.int8),
        "SCB": largest[:, 0],
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return tensors, codes * (largest / 127)


def compressed(make, rows, columns, bits=4, group=32, zero=False, packed=True, dtype=torch.bfloat16):
    """``group``: 0 is one scale for all."""
    half, width = 2 ** (bits - 1), columns if group < 1 else group
    codes = make.codes(-half, half - 1, rows, columns)
    high = 1 if group == 0 else rows
    scales = make.scales(dtype, 2**bits, high, -(-columns // width))
    zeros = make.codes(-half, half - 1, *scales.shape) if zero else torch.zeros(scales.shape)
    tensors = {"weight_scale": scales if group else scales.view(1)}
    if packed:
        tensors |= {"weight_packed": words(codes + half, bits), "weight_shape": torch.tensor([rows, columns])}
    else:
        tensors["weight"] = codes.to(torch.int8)
    if zero:
        stored = words((zeros + half).T, bits).T.contiguous() if packed else zeros.to(torch.int8)
        tensors["weight_zero_point"] = stored
    numbers = spread(scales.float(), width, columns) * (codes - spread(zeros, width, columns))
    return tensors, numbers.expand(rows, columns)


def compressed_fp8(make, rows, columns, group=-1, dtype=torch.bfloat16):
    width = columns if group < 1 else group
    weight, scales = make.fp8(rows, columns), make.scales(dtype, 100, 1 if group == 0 else rows, -(-columns // width))
    stored = scales if group else scales.view(1)
    return {"weight": weight, "weight_scale": stored}, weight.float() * spread(scales.float(), width, columns)


def of_groups(format, **weights):
    group = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, "dynamic": False, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*layers.1.self_attn.v_proj"],
    }


def of_gptq(bits=4, group=32, **more):
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": False, "desc_act": False, **more}


PACKED = "pack-quantized"
PLAIN = ("lm_head", "model.layers.1.self_attn.v_proj")
"""Modules that most of the configs leave out: a projection that is fused with others, too."""

SCHEMES = {
    "gptq": ("llama", of_gptq(dynamic={"-:.*v_proj": {}}), gptq, {}),
    "gptq-v2-8": ("qwen2", of_gptq(8, checkpoint_format="gptq_v2", lm_head=True), gptq, {"bits": 8, "less": 0}),
    "gptq-channel": ("qwen3", of_gptq(4, -1), gptq, {"group": -1, "dtype": torch.bfloat16}),
    "gptq-2": ("qwen3", of_gptq(2, 16), gptq, {"bits": 2, "group": 16}),
    "awq": (
        "llama",
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 16,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["layers.1.self_attn.v_proj"],
        },
        awq,
        {"group": 16},
    ),
    "fp8": (
        "qwen3",
        {
            "quant_method": "fp8",
            "weight_block_size": [16, 32],
            "activation_scheme": "dynamic",
            "modules_to_not_convert": ["lm_head", "model.layers.1.self_attn.v_proj"],
        },
        fp8,
        {},
    ),
    "bnb-int8": (
        "qwen2",
        {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "llm_int8_skip_modules": ["lm_head", "model.layers.1.self_attn.v_proj"],
        },
        bitsandbytes8,
        {},
    ),
    "ct-int4": ("llama", of_groups(PACKED, num_bits=4, strategy="group", group_size=32), compressed, {}),
    "ct-int4-zeros": (
        "qwen2",
        of_groups(PACKED, num_bits=4, strategy="group", group_size=24, symmetric=False),
        compressed,
        {"group": 24, "zero": True, "dtype": torch.float32},
    ),
    "ct-int8-packed": (
        "qwen3",
        of_groups(PACKED, num_bits=8, strategy="channel", symmetric=False),
        compressed,
        {"bits": 8, "group": -1, "zero": True},
    ),
    "ct-int8": (
        "llama",
        of_groups("int-quantized", num_bits=8, strategy="channel"),
        compressed,
        {"bits": 8, "group": -1, "packed": False},
    ),
    "ct-int8-zeros": (
        "llama",
        of_groups("naive-quantized", num_bits=8, strategy="group", group_size=16, symmetric=False),
        compressed,
        {"bits": 8, "group": 16, "packed": False, "zero": True},
    ),
    "ct-fp8": (
        "qwen2",
        of_groups("float-quantized", num_bits=8, type="float", strategy="tensor"),
        compressed_fp8,
        {"group": 0},
    ),
    "ct-fp8-squares": (
        "llama",
        of_groups("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[16, 32]),
        fp8,
        {"leaf": "weight_scale", "dtype": torch.float32},
    ),
}


def build(family):
    """The transformers model with random weights, in float32."""
    known = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    more = {"head_dim": HEAD_DIM[family]} if family in HEAD_DIM else {}
    sizes = {**SIZES, **MODELS[family], **more}
    config = getattr(transformers, f"{known}Config")(**sizes, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(len(family))
    model = getattr(transformers, f"{known}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(1.0 if parameter.mean() == 1 else 0.0, 0.2)
        else:
            parameter.data.normal_(0, 0.15)
        parameter.data = parameter.data.bfloat16().float()
    return model


def write(folder, name, change=None, **options):
    """Save a checkpoint of that scheme; returns the model that it stands for.

    Args:
        change: called with the config and the tensors before they are written.
        options: of the function that makes matrices, instead of the scheme's own.
    """
    family, quantised, make, given = SCHEMES[name]
    quantised, options = copy.deepcopy(quantised), {**given, **options}
    model, maker, tensors = build(family), Maker(len(name)), {}
    plain = ("lm_head",) if name.startswith("gptq-channel") or name == "gptq-2" else () if "v2" in name else PLAIN
    for key, parameter in model.named_parameters():
        module = key.removesuffix(".weight")
        if name == "gptq" and module.endswith("v_proj"):
            tensors[key] = parameter.data
        elif key.endswith("proj.weight") or (key == "lm_head.weight" and module not in plain):
            if module in plain:
                tensors[key] = parameter.data
                continue
            leaves, numbers = make(maker, *parameter.shape, **options)
            tensors |= {
                f"{module}.{leaf}": tensor for leaf, tensor in leaves.items() if f"{module}.{leaf}" not in tensors
            }
            parameter.data = numbers.float().clone()
        else:
            tensors[key] = parameter.data
    config = {**model.config.to_dict(), "dtype": "float32", "quantization_config": quantised}
    if change is not None:
        change(config, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file({key: each.contiguous() for key, each in tensors.items()}, folder / "model.safetensors")
    return model
