"""Models that were quantised before the split: exact, or refused by name before anything is changed."""

import re

import pytest
import torch

import multicard as mc
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
    """As torchao's class of this name: it says that it is float32."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

    def __init__(self, data):
        self.qdata = data.to(torch.int8)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].qdata)
        raise NotImplementedError(function)


class QuantLinear(torch.nn.Module):
    """As GPTQ's."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", linear.weight.to(torch.int8))


def subclassed(linear):
    linear.weight = torch.nn.Parameter(Int8Tensor(linear.weight.detach()), requires_grad=False)
    return linear


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
        (subclassed, r"\w+'s Int8Tensor"),
        (QuantLinear, r"\w+'s QuantLinear"),
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
