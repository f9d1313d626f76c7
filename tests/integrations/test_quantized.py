"""Models that were quantised before the split: exact, or refused by name before anything is changed."""

import re

import gguf
import pytest
import torch
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

import multicard as mc
import pipelines
import zoo
from multicard.errors import UnsupportedError


class Int8Params(torch.nn.Parameter):
    """As bitsandbytes' class of this name: numbers of type int8."""


class Linear8bitLt(torch.nn.Linear):
    """As bitsandbytes' class of this name."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = Int8Params(linear.weight.to(torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ self.weight.T.to(x.dtype)


class Int8Tensor(torch.Tensor):
    """As torchao's class of this name: a wrapper with its attributes and its product, which calls itself float32."""

    @staticmethod
    def __new__(cls, qdata, scale, block_size, dtype, **more):
        return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=dtype)

    def __init__(self, qdata, scale, block_size, dtype, zero_point=None, act_quant_kwargs=None):
        self.qdata, self.scale, self.block_size, self.zero_point = qdata, scale, block_size, zero_point
        self.act_quant_kwargs, self.act_pre_scale = act_quant_kwargs, None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            x, weight, bias = args
            assert weight.block_size == [1, weight.qdata.shape[1]]
            y = (x @ weight.qdata.T.to(x.dtype)) * weight.scale.T
            return y if bias is None else y + bias
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            old = args[0]
            return cls(old.qdata, old.scale, old.block_size, old.dtype, act_quant_kwargs=old.act_quant_kwargs)
        raise NotImplementedError(function)


class QuantLinear(torch.nn.Module):
    """As GPTQ's."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", linear.weight.to(torch.int8))


def subclassed(linear, **more):
    scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
    data = (linear.weight.detach() / scale).round().to(torch.int8)
    weight = Int8Tensor(data, scale, [1, data.shape[1]], torch.float32, **more)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear


def with_inputs(linear):
    """Quantised, and the layer's inputs too."""
    return subclassed(linear, act_quant_kwargs=object())


def fp8(linear):
    from transformers.integrations.finegrained_fp8 import FP8Linear

    return FP8Linear(linear.in_features, linear.out_features)


def narrow(linear):
    linear.weight = torch.nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return linear


def dynamic(linear):
    return torch.ao.nn.quantized.dynamic.Linear(linear.in_features, linear.out_features)


@pytest.mark.parametrize(
    ("quantise", "kind"),
    [
        (Linear8bitLt, r"bitsandbytes' 8-bit"),
        (with_inputs, r"Int8Tensor of \w+"),
        (QuantLinear, r"QuantLinear of \w+"),
        (fp8, r"transformers' FP8"),
        (narrow, r"float8_e4m3fn"),
        (dynamic, r"torch's int8"),
    ],
)
def test_refused_by_name_before_anything_is_changed(run_on, quantise, kind):
    def here(mesh):
        model = zoo.build("llama")
        mlp = model.model.layers[1].mlp
        mlp.down_proj = quantise(mlp.down_proj)
        before = {name: type(module) for name, module in model.named_modules()}
        try:
            mc.parallelize(model, mesh)
        except UnsupportedError as error:
            return str(error), before == {name: type(module) for name, module in model.named_modules()}

    for said, unchanged in run_on(here, tp=2):
        assert re.match(rf"model.layers.1.mlp.down_proj is quantised \({kind}\), which", said)
        assert unchanged


@pytest.mark.parametrize("degrees", [{"tp": 2}, {"tp": 3}, {"tp": 4}, {"ring": 2}, {"tp": 2, "ulysses": 2}], ids=str)
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_int8_with_a_scale_for_each_row(run_on, name, degrees):
    def quantised():
        model = zoo.build(name)
        for module in [module for module in model.modules() if isinstance(module, torch.nn.Linear)]:
            subclassed(module)
        return model

    def here(mesh):
        model = mc.parallelize(quantised(), mesh)
        down = model.model.layers[1].mlp.down_proj
        return zoo.forward(model, name), type(down.weight).__name__, down.weight.qdata.shape[1]

    alone = zoo.forward(quantised(), name)
    assert zoo.relative_error(zoo.forward(zoo.build(name), name), alone) > 1e-3
    ranks = run_on(here, **degrees)
    for output, kind, _ in ranks:
        assert zoo.relative_error(output, alone) <= 1e-5
        assert kind == "Int8Tensor"
    assert sum(width for *_, width in ranks) == 85 * len(ranks) // degrees.get("tp", 1)


def test_int8_of_torchao_itself(run_on):
    """Where it is installed; it isn't with the other packages of the tests."""
    quantization = pytest.importorskip("torchao.quantization")

    def quantised():
        model = zoo.build("llama")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model

    def here(mesh):
        return zoo.forward(mc.parallelize(quantised(), mesh), "llama")

    alone = zoo.forward(quantised(), "llama")
    assert max(zoo.relative_error(output, alone) for output in run_on(here, tp=3)) <= 1e-5


TYPES = ("Q8_0", "Q4_0")  # a block is 32 numbers; those of 256 are wider than a tiny model


def gguf_transformer(kind):
    """A Flux denoiser whose blocks' linear layers are GGUF. Its heads end within blocks."""
    torch.manual_seed(0)
    model = pipelines.flux_transformer(attention_head_dim=16, num_attention_heads=6).eval().requires_grad_(False)
    for owner in list(model.modules()):
        for name, linear in list(owner.named_children()):
            if isinstance(linear, torch.nn.Linear) and linear.in_features % 32 == 0:
                setattr(owner, name, as_gguf(linear, kind))
    return model


def as_gguf(linear, kind):
    quant = getattr(gguf.GGMLQuantizationType, kind)
    made = GGUFLinear(linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=torch.float32)
    data = torch.from_numpy(gguf.quants.quantize(linear.weight.detach().numpy(), quant))
    made.weight, made.bias = GGUFParameter(data, quant_type=quant), linear.bias
    return made.requires_grad_(False)


def gguf_pipeline(kind):
    pipe, arguments = pipelines.build("flux_true_cfg")
    pipe.register_modules(transformer=gguf_transformer(kind))
    return pipe, arguments


@pytest.mark.seam
@pytest.mark.parametrize("degrees", [{"tp": 2}, {"tp": 3}, {"tp": 4}, {"tp": 2, "cfg": 2}], ids=str)
@pytest.mark.parametrize("kind", TYPES)
def test_gguf_of_diffusers(run_on, kind, degrees):
    def here(mesh):
        pipe, arguments = gguf_pipeline(kind)
        mc.parallelize(pipe, mesh)
        size = sum(p.numel() for n, p in pipe.transformer.named_parameters() if p.dtype == torch.uint8)
        return pipelines.sample(pipe, arguments), size

    pipe, arguments = gguf_pipeline(kind)
    alone = pipelines.sample(pipe, arguments)
    whole = sum(p.numel() for p in pipe.transformer.parameters() if p.dtype == torch.uint8)
    assert whole > 50_000
    for sample, size in run_on(here, **degrees):
        assert zoo.relative_error(sample, alone) <= 1e-5
        assert size < 0.85 * whole


@pytest.mark.seam
def test_adapters_on_quantised_layers(run_on):
    """LoRA is computed beside the quantised weight; merging it into one is refused."""

    def lora(pipe):
        for adapter, seed in (("a", 3), ("b", 4)):
            found, generator = {}, torch.Generator().manual_seed(seed)
            for path, module in pipelines.flux_transformer(
                attention_head_dim=16, num_attention_heads=6
            ).named_modules():
                if isinstance(module, torch.nn.Linear) and "blocks" in path:
                    found[f"transformer.{path}.lora_A.weight"] = torch.randn(3, module.in_features, generator=generator)
                    found[f"transformer.{path}.lora_B.weight"] = torch.randn(
                        module.out_features, 3, generator=generator
                    )
            pipe.load_lora_weights({name: tensor / 5 for name, tensor in found.items()}, adapter_name=adapter)

    def here(mesh):
        found = []
        for before in (True, False):
            pipe, arguments = gguf_pipeline("Q8_0")
            if before:
                lora(pipe)
            mc.parallelize(pipe, mesh)
            if not before:
                lora(pipe)
            found.append(pipelines.sample(pipe, arguments))
        try:
            pipe.transformer.transformer_blocks[0].attn.to_q.merge()
        except UnsupportedError as error:
            return found, str(error)

    pipe, arguments = gguf_pipeline("Q8_0")
    plain = pipelines.sample(pipe, arguments)
    lora(pipe)
    alone = pipelines.sample(pipe, arguments)
    assert zoo.relative_error(plain, alone) > 0.05
    for samples, said in run_on(here, tp=3):
        assert max(zoo.relative_error(sample, alone) for sample in samples) <= 1e-5
        assert "a weight that is quantised (GGUFParameter of diffusers)" in said
